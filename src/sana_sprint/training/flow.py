"""Latents with captions to a trained flow transformer, first plain, then with its guidance built in.

B batch, C channels, h w latent grid, L text tokens, M examples. Flow time runs from 0 clean to 1 noise.
"""

import copy
from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import Gemma2Model, GemmaTokenizer

from sana_sprint.layers.attention import SanaAttention
from sana_sprint.layers.embeddings import TimeGuidanceEmbedding
from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.text.encoder import encode_prompts
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION, instruction_prefix
from sana_sprint.training.datasets.source import LatentBatch, LatentSource
from sana_sprint.training.draws import Draws
from sana_sprint.training.identity import sources, tensors_digest
from sana_sprint.training.language import read_behind, tokenize_behind
from sana_sprint.training.loop import Objective, Validation, train
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import ControlSamples
from sana_sprint.transformer.trunk import SanaTrunk

N = TypeVar("N", bound=SanaTrunk)


@dataclass(frozen=True, kw_only=True)
class FlowMatchingSettings:
    """The objective of a flow transformer."""

    optimiser: OptimiserSettings
    # Share of the captions replaced by the empty one, which guidance needs a velocity for.
    caption_dropout: float = 0.1
    # Mean of the normal whose logistic the times are: above 0 for more noise, where captions matter most.
    time_mean: float = 0.9
    use_muon: bool = True  # for the matrices of the blocks, which must be whole then: no FSDP
    compile: bool = True


# What a run must be gone on with beside its loop's and its groups' settings; compiled or not, it goes on.
_OWN_SETTINGS = tuple(
    setting.name for setting in fields(FlowMatchingSettings) if setting.name not in ("optimiser", "compile")
)


@dataclass(frozen=True, kw_only=True)
class FlowSettings(FlowMatchingSettings):
    """The network, the objective and the length of both stages of the shapes recipe."""

    config: dict[str, Any]
    loop: LoopSettings
    guidance_loop: LoopSettings
    guidance_optimiser: OptimiserSettings
    guidance_range: tuple[float, float] = (1.0, 5.0)


@dataclass(frozen=True)
class FlowData:
    """All latents, already scaled, and the text features of their captions; the last caption is the empty one.

    A `LatentSource`. What it holds stays on the CPU; `device` is where its batches are.
    """

    latents: torch.Tensor  # M C h w
    captions: torch.Tensor  # M + 1 L width
    masks: torch.Tensor  # M + 1 L
    device: torch.device | str = "cpu"
    controls: torch.Tensor | None = None  # M C h w, latents of what a ControlNet is shown of each picture

    @cached_property
    def tokens_up_to(self) -> torch.Tensor:
        """Of all captions up to each, (M,), without the empty one."""
        return self.masks[:-1].sum(1).cumsum(0)

    def batch(self, draws: Draws, caption_dropout: float = 0.0, misaligned: bool = False) -> LatentBatch:
        """A part's examples; see `LatentSource`."""
        # As often as a caption is long: those that say more are harder to follow, and need more practice.
        tokens = draws.integers(int(self.tokens_up_to[-1])).cpu()
        chosen = torch.searchsorted(self.tokens_up_to, tokens, right=True)
        texts = torch.where(draws.uniform().cpu() < caption_dropout, len(self.latents), chosen)
        clean = self.latents[chosen].to(self.device)
        control = None if self.controls is None else self.controls[chosen].to(self.device)
        if not misaligned:
            return LatentBatch(clean, *self._text(texts), control=control)
        offsets = 1 + draws.integers(len(self.latents) - 1).cpu()
        wrong = self._text((chosen + offsets) % len(self.latents))
        return LatentBatch(clean, *self._text(texts), *wrong, control=control)

    def empty_caption(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask of the empty caption, `size` times."""
        return self._text(torch.full((size,), len(self.latents)))

    def identity(self) -> str:
        """Changes with the latents and the texts."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return tensors_digest({name: value for name, value in held.items() if isinstance(value, torch.Tensor)})

    def to(self, device: torch.device) -> "FlowData":
        """The same data, with its batches on a device."""
        return replace(self, device=device)

    def only(self, chosen: torch.Tensor) -> "FlowData":
        """Some of the examples (M,), bool."""
        texts = torch.cat([chosen, chosen.new_ones(1)])
        controls = None if self.controls is None else self.controls[chosen]
        return FlowData(self.latents[chosen], self.captions[texts], self.masks[texts], self.device, controls)

    def _text(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.captions[chosen].to(self.device).float(), self.masks[chosen].to(self.device)


@torch.no_grad()
def encode_captions(
    tokenizer: GemmaTokenizer, text_encoder: Gemma2Model, captions: list[str], length: int, batch_size: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (M + 1, L, width) in bfloat16 and masks of captions as a pipeline encodes them, then of "".

    The empty caption stands without the instruction, as in SANA's unconditional text.

    Raises:
        ValueError: for a caption of more than `length` tokens.
    """
    text_encoder.eval()
    shared, suffixes = tokenize_behind(tokenizer, instruction_prefix(COMPLEX_HUMAN_INSTRUCTION), captions)
    longest = max(map(len, suffixes)) + 1
    if longest > length:
        raise ValueError(f"captions must fit {length} tokens, found one of {longest}")

    embeds = torch.zeros(len(captions) + 1, longest, text_encoder.config.hidden_size, dtype=torch.bfloat16)
    masks = torch.zeros(len(captions) + 1, longest, dtype=torch.long)
    masks[:, 0] = 1
    by_length = sorted(range(len(captions)), key=lambda index: len(suffixes[index]))
    for start in tqdm(
        range(0, len(captions), batch_size), desc="encoding captions", unit="batch", dynamic_ncols=True, disable=None
    ):
        chosen = by_length[start : start + batch_size]
        padded = tokenizer.pad({"input_ids": [suffixes[i] for i in chosen]}, padding_side="right", return_tensors="pt")
        prefix, states = read_behind(text_encoder, shared, padded.input_ids, padded.attention_mask)
        size = padded.input_ids.shape[1]
        embeds[chosen, 0] = prefix[0, 0].bfloat16()
        embeds[chosen, 1 : size + 1] = (states * padded.attention_mask[:, :, None]).bfloat16()
        masks[chosen, 1 : size + 1] = padded.attention_mask
    empty = encode_prompts(
        tokenizer, text_encoder, [""], device="cpu", dtype=torch.bfloat16, max_sequence_length=longest
    )
    embeds[-1], masks[-1] = empty.embeds[0] * empty.mask[0, :, None].bfloat16(), empty.mask[0]
    return embeds, masks


def draw_times(draws: Draws, mean: float) -> torch.Tensor:
    """Flow times (B,): the logistic function of a normal of unit variance (Esser et al., 2024)."""
    return (mean + draws.normal()).sigmoid()


def noisy_latents(clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Latents at flow time `time` (B,) on the straight line from data to noise."""
    return torch.lerp(clean, noise, time.view(-1, 1, 1, 1))


def embeds_guidance(network: SanaTrunk) -> bool:
    """Whether the guidance scale is an input of the network."""
    return isinstance(network.time_embed, TimeGuidanceEmbedding)


def time_guidance_embedding(network: SanaTrunk) -> TimeGuidanceEmbedding:
    """The module that embeds time and guidance scale.

    Raises:
        ValueError: if the network embeds no guidance.
    """
    if not isinstance(network.time_embed, TimeGuidanceEmbedding):
        raise ValueError("the network must embed its guidance: its config needs guidance_embeds=True")
    return network.time_embed


def initialise(transformer: SanaTransformer2DModel) -> None:
    """Start where training is stable: no modulation, a silent output, and a guidance embedding that adds nothing."""
    embedding = time_guidance_embedding(transformer)
    time, guidance = embedding.timestep_embedder, embedding.guidance_embedder
    for layer in (time.linear_1, time.linear_2, guidance.linear_1):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (guidance.linear_2, embedding.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def predict_velocity(
    transformer: SanaTransformer2DModel,
    latents: torch.Tensor,
    time: torch.Tensor,
    caption: torch.Tensor,
    mask: torch.Tensor,
    guidance: torch.Tensor | None,
    residuals: ControlSamples | None = None,
) -> torch.Tensor:
    """Velocity (B, C, h, w) in float32, at guidance scales (B,) if the transformer embeds them.

    `residuals` are what a ControlNet adds.
    """
    return transformer(
        latents,
        encoder_hidden_states=caption,
        timestep=time,
        guidance=None if guidance is None else guidance * transformer.config.guidance_embeds_scale,
        encoder_attention_mask=mask,
        controlnet_block_samples=residuals,
        return_dict=False,
    )[0].float()


def block_matrices(network: SanaTrunk) -> list[nn.Parameter]:
    """Weights of all linear layers and 1x1 convolutions in the blocks."""
    layers = (layer for block in network.transformer_blocks for layer in block.modules())
    return [cast(nn.Parameter, layer.weight) for layer in layers if isinstance(layer, (nn.Linear, PointwiseConv2d))]


def new_transformer(settings: FlowSettings) -> SanaTransformer2DModel:
    """A transformer as training from nothing starts with."""
    torch.manual_seed(settings.loop.seed)
    transformer = SanaTransformer2DModel(**settings.config)
    initialise(transformer)
    return transformer


def use_training_kernels(network: SanaTrunk) -> None:
    """Have attention computed as its backward pass is fast."""
    for module in network.modules():
        if isinstance(module, SanaAttention):
            # The backward pass of the fused kernel takes ten times as long on a CPU, for the few tokens of a caption.
            module.set_attention_backend("_native_math")  # type: ignore[operator]


def prepared(network: N, settings: FlowMatchingSettings) -> N:
    """The same network, ready to be trained."""
    use_training_kernels(network)
    if settings.compile:
        network.compile()
    return network


class FlowMatching(Objective[N]):
    """Flow matching with caption dropout: predict noise minus data (Lipman et al., 2023; Liu et al., 2023).

    Subclasses say which networks predict it, and which of them is trained: the one that is averaged.
    """

    def __init__(self, data: LatentSource, settings: FlowMatchingSettings) -> None:
        super().__init__()
        self.data = data
        self.settings = settings

    @abstractmethod
    def velocity(self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch) -> torch.Tensor:
        """The velocity (B, C, h, w) of noisy latents at flow times (B,), in float32."""

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        batch = self.data.batch(draws, self.settings.caption_dropout)
        noise = draws.normal(batch.clean.shape[1:])
        time = draw_times(draws, self.settings.time_mean)
        velocity = self.velocity(noisy_latents(batch.clean, noise, time), time, batch)
        return {"loss": F.mse_loss(velocity, noise - batch.clean)}

    def groups(self) -> list[ParameterGroup]:
        network = self.averaged()
        (name,) = (name for name, child in self.named_children() if child is network)
        matrices = block_matrices(network) if self.settings.use_muon else []
        return [ParameterGroup(name, trainable(network), self.settings.optimiser, matrices)]

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in _OWN_SETTINGS}


class FlowObjective(FlowMatching[SanaTransformer2DModel]):
    """Flow matching by a transformer; one without a guidance embedding is trained whole."""

    def __init__(self, transformer: SanaTransformer2DModel, data: LatentSource, settings: FlowMatchingSettings) -> None:
        super().__init__(data, settings)
        if embeds_guidance(transformer):
            # The guidance embedding waits for its stage, and adds zero until then.
            time_guidance_embedding(transformer).guidance_embedder.requires_grad_(False)
        self.transformer = transformer

    def velocity(self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch) -> torch.Tensor:
        guidance = torch.ones_like(time) if embeds_guidance(self.transformer) else None
        return predict_velocity(self.transformer, latents, time, batch.caption, batch.mask, guidance)

    def averaged(self) -> SanaTransformer2DModel:
        return self.transformer


def train_flow(
    transformer: SanaTransformer2DModel,
    data: LatentSource,
    settings: FlowMatchingSettings,
    loop: LoopSettings,
    folder: Path,
    device: torch.device,
    validate: Validation | None = None,
) -> SanaTransformer2DModel:
    """Train a transformer to predict the flow's velocity from latents, time and caption; the rest is as for `train`."""
    began_with = sources(data, start=transformer)
    objective = FlowObjective(prepared(transformer, settings), data.to(device), settings)
    return train(objective, loop, folder, "flow", device, validate, began_with).requires_grad_(True)


def guided_target(
    clean: torch.Tensor,
    noise: torch.Tensor,
    with_caption: torch.Tensor,
    without: torch.Tensor,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """What a network with built-in guidance learns: the data's velocity, moved on along the teacher's guidance.

    noise - clean + (w - 1) (v_caption - v_empty) for scales w (B,). Its mean over the noise is the velocity of
    classifier-free guidance, v_empty + w (v_caption - v_empty), with v_caption from the data and not from the teacher:
    the student goes on learning where the teacher stopped (Tang et al., "Diffusion Models without Classifier-free
    Guidance", 2025).
    """
    return noise - clean + (guidance.view(-1, 1, 1, 1) - 1) * (with_caption - without)


class GuidanceObjective(Objective[SanaTransformer2DModel]):
    """One pass of the student predicts what takes its teacher two; the guidance scale is drawn per example.

    The teacher stays as it is. An empty caption learns the plain velocity at every scale.
    """

    def __init__(
        self,
        student: SanaTransformer2DModel,
        teacher: SanaTransformer2DModel,
        data: LatentSource,
        settings: FlowSettings,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.data = data
        self.settings = settings

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        batch = self.data.batch(draws, self.settings.caption_dropout)
        noise = draws.normal(batch.clean.shape[1:])
        time = draw_times(draws, self.settings.time_mean)
        latents = noisy_latents(batch.clean, noise, time)
        low, high = self.settings.guidance_range
        guidance = low + (high - low) * draws.uniform()
        empty, empty_mask = self.data.empty_caption(draws.size)
        with torch.no_grad():
            ones = torch.ones_like(time)
            with_caption = predict_velocity(self.teacher, latents, time, batch.caption, batch.mask, ones)
            without = predict_velocity(self.teacher, latents, time, empty, empty_mask, ones)
        target = guided_target(batch.clean, noise, with_caption, without, guidance)
        velocity = predict_velocity(self.student, latents, time, batch.caption, batch.mask, guidance)
        return {"loss": F.mse_loss(velocity, target)}

    def groups(self) -> list[ParameterGroup]:
        matrices = block_matrices(self.student) if self.settings.use_muon else []
        return [ParameterGroup("student", trainable(self.student), self.settings.guidance_optimiser, matrices)]

    def averaged(self) -> SanaTransformer2DModel:
        return self.student

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in (*_OWN_SETTINGS, "guidance_range")}


def train_guidance(
    teacher: SanaTransformer2DModel, data: LatentSource, settings: FlowSettings, folder: Path, device: torch.device
) -> SanaTransformer2DModel:
    """Teach a copy of a plain transformer its guidance embedding; return the copy."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    began_with = sources(data, teacher=teacher)
    objective = GuidanceObjective(prepared(student, settings), prepared(teacher, settings), data.to(device), settings)
    return train(objective, settings.guidance_loop, folder, "guidance", device, sources=began_with)
