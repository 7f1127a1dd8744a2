"""A SANA-Sprint transformer and a few pictures to adapters (LoRA) that draw what is new in them, in as few steps.

A distilled model does not know the velocity of the flow, and the plain diffusion loss would teach it that and undo the
distillation. What is kept here is the loss that it was distilled with: consistency, along the way of the pictures
themselves in the place of a teacher's.

B batch, C channels, h w latent grid. Latents have unit variance; angles are TrigFlow's, in radians.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin
from torch import nn

from sana_sprint.training.datasets.source import LatentBatch, LatentSource
from sana_sprint.training.distillation import AngleDistribution
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import predict_velocity, use_training_kernels
from sana_sprint.training.loop import Objective
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.trigflow.bridge import trigflow_velocity
from sana_sprint.trigflow.consistency import consistency_tangent, tangent_error, velocity_and_derivative
from sana_sprint.trigflow.path import add_noise, predict_clean, velocity_target

# Every projection of both attentions, and the 1x1 convolutions of the mix-FFN.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")

# Root mean square of a difference up to which its loss is a square, and beyond which it is a length.
_HUBER_SCALE = 0.03

_NAME = "default"  # PEFT's, of an adapter without one


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters and their objective.

    Raises:
        ValueError: for adapters of no rank or on nothing, and for a weight or a share that is none.
    """

    optimiser: OptimiserSettings
    rank: int = 16
    targets: tuple[str, ...] = TARGETS  # ends of the names of linear layers and 1x1 convolutions
    sigma_data: float = 0.5  # shifts the angles only: the network sees unit variance
    angles: AngleDistribution = field(default_factory=lambda: AngleDistribution(mean=0.0, std=1.6))
    # Those that will be drawn with. They are an input; the pictures are the goal at each of them.
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    # Of the prior's loss, if there is a prior: 1 pulls back as hard as a picture pulls away.
    preservation_weight: float = 1.0
    # Share of the prior's examples that are pure noise, where every picture begins.
    pure_noise_share: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.targets:
            raise ValueError(f"targets must name layers, such as {', '.join(TARGETS)}; got none")
        if not self.guidance_scales:
            raise ValueError("guidance_scales must hold at least one scale, got none")
        if not 0 <= self.preservation_weight < math.inf:
            raise ValueError(f"preservation_weight must be 0 or more, got {self.preservation_weight}")
        if not 0 <= self.pure_noise_share <= 1:
            raise ValueError(f"pure_noise_share must lie in [0, 1], got {self.pure_noise_share}")


def add_adapters(transformer: SanaTransformer2DModel, rank: int, targets: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze a transformer and give it new adapters, of scale 1, which change nothing yet.

    Returns:
        Their weights, in float32, by the names of diffusers' files.

    Raises:
        ValueError: for a target that the transformer does not have, or that cannot be adapted.
        ImportError: if peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'sana-sprint[lora]'") from error
    names = [name for name, _ in transformer.named_modules()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        raise ValueError(
            f"the transformer has no layers {', '.join(unknown)}: targets are such as {', '.join(TARGETS)}"
        )
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), _NAME)
    adapters = {}
    for name, parameter in transformer.named_parameters():
        if f".{_NAME}." in name:
            parameter.data = parameter.data.float()
            adapters[name.replace(f".{_NAME}.", ".")] = parameter
    return adapters


@contextmanager
def without_adapters(transformer: SanaTransformer2DModel) -> Iterator[None]:
    """Inside, a transformer computes what it did before it was adapted."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def huber_loss(difference: torch.Tensor) -> torch.Tensor:
    """The length of each difference (B, ...), rounded off at zero: sqrt(|d|^2 + c^2) - c, (B,).

    The pseudo-Huber loss (Song and Dhariwal, arXiv 2310.14189). Its gradient has a length below 1, as a tangent of
    consistency has, so the two can be weighed against each other whatever the size of the latents.
    """
    offset = _HUBER_SCALE * math.sqrt(difference[0].numel())
    return (difference.flatten(1).square().sum(1) + offset**2).sqrt() - offset


class LoraObjective(Objective[nn.ParameterList]):
    """Consistency training of adapters (sCT of Lu and Song, arXiv 2410.11081); all else is frozen.

    Where distillation follows the teacher's velocity, the sample moves with its own, cos(t) z - sin(t) x, whose mean is
    that of the pictures' flow. So no teacher is needed, and there is no guidance in the goal. Two things differ from a
    training that starts from a flow model. The tangent has no warm-up: without its second part it is the diffusion
    loss. And no variance is learned with it: its tangents are nearly of length 1, so all angles count alike once the
    weight 1 / tan(t), which the variance would learn to cancel, is left out.

    On a prior, which is other pictures with captions, the network shall go on predicting what it does without adapters.

    Args:
        transformer: SANA-Sprint's, which is changed: it is frozen, and has adapters from now on.
        data: the pictures.
        settings: all settings.
        prior: the others.

    Raises:
        ValueError: as `add_adapters`.
        ImportError: if peft is not installed.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        data: LatentSource,
        settings: LoraSettings,
        prior: LatentSource | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.data = data
        self.prior = prior
        adapters = add_adapters(transformer, settings.rank, settings.targets)
        self.names = tuple(adapters)
        # The same parameters as in the transformer, by themselves: what is averaged is no more than they are.
        self.adapters = nn.ParameterList(adapters.values())
        self.transformer = transformer
        use_training_kernels(transformer)

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("adapters", list(self.adapters), self.settings.optimiser)]

    def averaged(self) -> nn.ParameterList:
        return self.adapters

    def own_settings(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self.settings).items() if name != "optimiser"}
        return {**own, "has_prior": self.prior is not None}

    @property
    def _no_split_modules(self) -> list[str]:
        # As for distillation: one unit, for hooks on single blocks cannot be differentiated forwards.
        return []

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        settings = self.settings
        batch = self.data.batch(draws)
        noise = draws.normal(batch.clean.shape[1:])
        guidance = draws.choice(settings.guidance_scales)
        angle = settings.angles.draw(draws, settings.sigma_data)
        sample = add_noise(batch.clean, noise, angle)
        own_velocity = velocity_target(batch.clean, noise, angle)
        velocity, derivative = self._differentiate(sample, angle, batch, guidance, own_velocity)
        tangent = consistency_tangent(sample, angle, velocity, own_velocity, derivative, warmup=1.0)
        losses = {"consistency": tangent_error(velocity, tangent).mean()}
        loss = losses["consistency"]
        if self.prior is not None:
            losses["preservation"] = self._preservation(self.prior, draws)
            loss = loss + settings.preservation_weight * losses["preservation"]
        with torch.no_grad():
            # That of consistency is the length of a tangent, which stays near 1 however well the network has learned.
            losses["distance"] = (predict_clean(sample, velocity, angle) - batch.clean).square().mean().sqrt()
            losses["derivative_norm"] = derivative.flatten(1).norm(dim=1).mean()
        return {"loss": loss, **losses}

    def _preservation(self, prior: LatentSource, draws: Draws) -> torch.Tensor:
        """How far the network has moved from where it began, on a batch of the prior."""
        settings = self.settings
        batch = prior.batch(draws)
        noise = draws.normal(batch.clean.shape[1:])
        guidance = draws.choice(settings.guidance_scales)
        is_pure_noise = draws.uniform() < settings.pure_noise_share
        angle = torch.where(is_pure_noise, math.pi / 2, settings.angles.draw(draws, settings.sigma_data))
        sample = add_noise(batch.clean, noise, angle)
        with torch.no_grad(), without_adapters(self.transformer):
            before = self._predict(sample, angle, batch, guidance)
        return huber_loss(self._predict(sample, angle, batch, guidance) - before).mean()

    def _predict(
        self, sample: torch.Tensor, angle: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return predict_velocity(self.transformer, latents, time, batch.caption, batch.mask, guidance)

        return trigflow_velocity(network, sample, angle, sigma_data=1.0)

    def _differentiate(
        self,
        sample: torch.Tensor,
        angle: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
        own_velocity: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def velocity_at(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
            return self._predict(sample, angle, batch, guidance)

        in_one_pass = not self.transformer.is_gradient_checkpointing
        return velocity_and_derivative(velocity_at, sample, angle, own_velocity, in_one_pass)

    @contextmanager
    def wearing(self, adapters: nn.ParameterList) -> Iterator[SanaTransformer2DModel]:
        """Inside, the transformer, which is what is given, has other adapters and is ready to draw."""
        own = [parameter.detach().clone() for parameter in self.adapters]
        is_training = self.transformer.training
        self._put_on(adapters)
        try:
            yield self.transformer.eval()
        finally:
            self._put_on(own)
            self.transformer.train(is_training)

    @torch.no_grad()
    def _put_on(self, weights: Any) -> None:
        for parameter, weight in zip(self.adapters, weights, strict=True):
            parameter.copy_(weight)


def save_adapters(names: tuple[str, ...], adapters: nn.ParameterList, folder: Path) -> None:
    """Write adapters as diffusers' `load_lora_weights` reads them, in float32."""
    weights = {name: weight.detach().cpu() for name, weight in zip(names, adapters, strict=True)}
    SanaLoraLoaderMixin.save_lora_weights(folder, transformer_lora_layers=weights)
