"""Latents with captions to a trained flow transformer, first plain, then with its guidance built in.

B batch, C channels, h w latent grid, L text tokens, M examples. Flow time runs from 0 clean to 1 noise.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

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
from sana_sprint.training.language import read_behind, tokenize_behind
from sana_sprint.training.loop import Draws, OptimiserSettings, train
from sana_sprint.transformer.model import SanaTransformer2DModel


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """The network, the objective and the length of both stages."""

    config: dict[str, Any]
    optimiser: OptimiserSettings
    guidance_optimiser: OptimiserSettings
    # Share of the captions replaced by the empty one, which guidance needs a velocity for.
    caption_dropout: float = 0.1
    # Mean of the normal whose logistic the times are: above 0 for more noise, where captions matter most.
    time_mean: float = 0.9
    guidance_range: tuple[float, float] = (1.0, 5.0)
    compile: bool = True


@dataclass(frozen=True)
class FlowBatch:
    """What one step learns from."""

    clean: torch.Tensor  # B C h w, unit variance
    caption: torch.Tensor  # B L width
    mask: torch.Tensor  # B L


@dataclass(frozen=True)
class FlowData:
    """All latents, already scaled, and the text features of their captions; the last caption is the empty one."""

    latents: torch.Tensor  # M C h w
    captions: torch.Tensor  # M + 1 L width
    masks: torch.Tensor  # M + 1 L

    @cached_property
    def tokens_up_to(self) -> torch.Tensor:
        """Of all captions up to each, (M,), without the empty one."""
        return self.masks[:-1].sum(1).cumsum(0)

    def batch(self, draws: Draws, size: int, caption_dropout: float) -> FlowBatch:
        # As often as a caption is long: those that say more are harder to follow, and need more practice.
        tokens = torch.from_numpy(draws.rng.random(size)).to(self.tokens_up_to.device) * self.tokens_up_to[-1]
        chosen = torch.searchsorted(self.tokens_up_to, tokens.floor().long(), right=True)
        is_dropped = torch.from_numpy(draws.rng.random(size) < caption_dropout).to(self.latents.device)
        texts = torch.where(is_dropped, len(self.latents), chosen)
        return FlowBatch(self.latents[chosen], self.captions[texts].float(), self.masks[texts])

    def to(self, device: torch.device) -> "FlowData":
        return FlowData(self.latents.to(device), self.captions.to(device), self.masks.to(device))

    def empty_caption(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask of the empty caption, `size` times."""
        return self.captions[-1:].float().expand(size, -1, -1), self.masks[-1:].expand(size, -1)


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


def draw_times(draws: Draws, size: int, mean: float, device: torch.device) -> torch.Tensor:
    """Flow times (B,): the logistic function of a normal of unit variance (Esser et al., 2024)."""
    return (mean + draws.normal((size,), device)).sigmoid()


def noisy_latents(clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Latents at flow time `time` (B,) on the straight line from data to noise."""
    return torch.lerp(clean, noise, time.view(-1, 1, 1, 1))


def time_guidance_embedding(transformer: SanaTransformer2DModel) -> TimeGuidanceEmbedding:
    """The module that embeds time and guidance scale.

    Raises:
        ValueError: if the transformer embeds no guidance.
    """
    if not isinstance(transformer.time_embed, TimeGuidanceEmbedding):
        raise ValueError("the transformer must embed its guidance: its config needs guidance_embeds=True")
    return transformer.time_embed


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
    guidance: torch.Tensor,
) -> torch.Tensor:
    """Velocity (B, C, h, w) at guidance scales (B,), in float32."""
    return transformer(
        latents,
        encoder_hidden_states=caption,
        timestep=time,
        guidance=guidance * transformer.config.guidance_embeds_scale,
        encoder_attention_mask=mask,
        return_dict=False,
    )[0].float()


def block_matrices(transformer: SanaTransformer2DModel) -> list[nn.Parameter]:
    """Weights of all linear layers and 1x1 convolutions in the blocks."""
    layers = (layer for block in transformer.transformer_blocks for layer in block.modules())
    return [cast(nn.Parameter, layer.weight) for layer in layers if isinstance(layer, (nn.Linear, PointwiseConv2d))]


def new_transformer(settings: FlowSettings) -> SanaTransformer2DModel:
    """A transformer as training from nothing starts with."""
    torch.manual_seed(settings.optimiser.seed)
    transformer = SanaTransformer2DModel(**settings.config)
    initialise(transformer)
    return transformer


def train_flow(
    transformer: SanaTransformer2DModel, data: FlowData, settings: FlowSettings, folder: Path, device: torch.device
) -> SanaTransformer2DModel:
    """Flow matching with caption dropout: predict noise minus data (Lipman et al., 2023; Liu et al., 2023)."""
    transformer.to(device)
    data = data.to(device)
    # The guidance embedding waits for its stage, and adds zero until then.
    time_guidance_embedding(transformer).guidance_embedder.requires_grad_(False)
    _prepare(transformer, settings.compile)

    def losses(draws: Draws) -> dict[str, torch.Tensor]:
        batch = data.batch(draws, settings.optimiser.batch_size, settings.caption_dropout)
        noise = draws.normal(batch.clean.shape, device)
        time = draw_times(draws, len(noise), settings.time_mean, device)
        latents = noisy_latents(batch.clean, noise, time)
        velocity = predict_velocity(transformer, latents, time, batch.caption, batch.mask, torch.ones_like(time))
        return {"loss": F.mse_loss(velocity, noise - batch.clean)}

    matrices = block_matrices(transformer)
    average = train(transformer, losses, settings.optimiser, folder, "flow", matrices=matrices)
    time_guidance_embedding(average).guidance_embedder.requires_grad_(True)
    return average


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


def train_guidance(
    teacher: SanaTransformer2DModel, data: FlowData, settings: FlowSettings, folder: Path, device: torch.device
) -> SanaTransformer2DModel:
    """Teach the guidance embedding, so that one pass predicts what takes two otherwise; the scale is drawn per example.

    The teacher stays as it is. An empty caption learns the plain velocity at every scale.
    """
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    data = data.to(device)
    low, high = settings.guidance_range
    _prepare(student, settings.compile)
    _prepare(teacher, settings.compile)

    def losses(draws: Draws) -> dict[str, torch.Tensor]:
        batch = data.batch(draws, settings.guidance_optimiser.batch_size, settings.caption_dropout)
        size = len(batch.clean)
        noise = draws.normal(batch.clean.shape, device)
        time = draw_times(draws, size, settings.time_mean, device)
        latents = noisy_latents(batch.clean, noise, time)
        guidance = low + (high - low) * draws.uniform((size,), device)
        empty, empty_mask = data.empty_caption(size)
        with torch.no_grad():
            ones = torch.ones_like(time)
            with_caption = predict_velocity(teacher, latents, time, batch.caption, batch.mask, ones)
            without = predict_velocity(teacher, latents, time, empty, empty_mask, ones)
        target = guided_target(batch.clean, noise, with_caption, without, guidance)
        velocity = predict_velocity(student, latents, time, batch.caption, batch.mask, guidance)
        return {"loss": F.mse_loss(velocity, target)}

    return train(student, losses, settings.guidance_optimiser, folder, "guidance", matrices=block_matrices(student))


def _prepare(transformer: SanaTransformer2DModel, compile: bool) -> None:
    for module in transformer.modules():
        if isinstance(module, SanaAttention):
            # The backward pass of the fused kernel takes ten times as long on a CPU, for the few tokens of a caption.
            module.set_attention_backend("_native_math")  # type: ignore[operator]
    if compile:
        transformer.compile()
