"""A ControlNet that draws best at another scale at each angle to one that draws so at scale 1.

What a ControlNet adds to a transformer may be multiplied by a scale when it draws. The embedded one came out of its
distillation too strong where one step is all, and too weak in later ones: docs/control.md. A copy learns to make, at
scale 1, the pictures that the ControlNet makes with the scales that are wanted, as a network learns guidance (Meng et
al., arXiv 2210.03142).

B batch, C channels, h w latent grid. Latents have unit variance; angles are TrigFlow's, in radians.
"""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sana_sprint.training.control import controlled_velocity
from sana_sprint.training.datasets.source import LatentBatch, LatentSource
from sana_sprint.training.distillation import AngleDistribution
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import block_matrices, use_training_kernels
from sana_sprint.training.loop import Objective
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.trigflow.bridge import trigflow_velocity
from sana_sprint.trigflow.path import add_noise, predict_clean


@dataclass(frozen=True, kw_only=True)
class ScaleByAngle:
    """The scale of a first step from an angle on, that of later steps up to a smaller one, and a line between them.

    Raises:
        ValueError: for angles that do not ascend.
    """

    first_scale: float
    first_from: float  # angle
    later_scale: float
    later_up_to: float  # angle

    def __post_init__(self) -> None:
        if not self.later_up_to < self.first_from:
            raise ValueError(f"later_up_to must lie below first_from, got {self.later_up_to} and {self.first_from}")

    def at(self, angle: torch.Tensor) -> torch.Tensor:
        """Of each angle, (B,)."""
        share = ((angle - self.later_up_to) / (self.first_from - self.later_up_to)).clamp(0, 1)
        return torch.lerp(torch.full_like(share, self.later_scale), torch.full_like(share, self.first_scale), share)


@dataclass(frozen=True, kw_only=True)
class RescalingSettings:
    """The objective."""

    optimiser: OptimiserSettings
    scale: ScaleByAngle
    # Of the first step, which begins at noise alone whatever angle a timetable gives it; even between the two.
    first_angles: tuple[float, float] = (1.54, math.pi / 2)
    later_angles: AngleDistribution
    sigma_data: float = 0.5  # shifts the later angles only
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    use_muon: bool = True  # for the matrices of the blocks, which must be whole then: no FSDP
    compile: bool = True


class ControlRescaling(Objective[SanaControlNetModel]):
    """A ControlNet learns to draw at scale 1 as another, from which it starts, does at a scale for each angle.

    It does so where it will be used: in a first step from noise alone, and in a later one from what the other has drawn
    in the first. The pictures of the data are not looked at, only captions and drawings.

    Args:
        transformer: the distilled one, which stays as it is.
        control: its ControlNet, which stays as it is.
        data: with drawings.
        settings: the scales, and how to learn them.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        control: SanaControlNetModel,
        data: LatentSource,
        settings: RescalingSettings,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.data = data
        self.transformer = transformer.eval().requires_grad_(False)
        self.student = copy.deepcopy(control).train().requires_grad_(True)
        self.control = control.eval().requires_grad_(False)
        for network in (self.transformer, self.student, self.control):
            use_training_kernels(network)
        self._predict = torch.compile(self._clean) if settings.compile else self._clean

    def groups(self) -> list[ParameterGroup]:
        matrices = block_matrices(self.student) if self.settings.use_muon else []
        return [ParameterGroup("student", trainable(self.student), self.settings.optimiser, matrices)]

    def averaged(self) -> SanaControlNetModel:
        return self.student

    def own_settings(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        return {name: value for name, value in settings.items() if name not in ("optimiser", "compile")}

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        settings = self.settings
        batch = self.data.batch(draws)
        guidance = draws.choice(settings.guidance_scales)
        low, high = settings.first_angles
        noise, angle = draws.normal(batch.clean.shape[1:]), low + (high - low) * draws.uniform()
        drawn = self._wanted(noise, angle, batch, guidance)
        first = F.mse_loss(self._predict(self.student, noise, angle, batch, guidance), drawn)

        angle = settings.later_angles.draw(draws, settings.sigma_data)
        sample = add_noise(drawn, draws.normal(drawn.shape[1:]), angle)
        wanted = self._wanted(sample, angle, batch, guidance)
        later = F.mse_loss(self._predict(self.student, sample, angle, batch, guidance), wanted)
        return {"loss": first + later, "first": first, "later": later}

    @torch.no_grad()
    def _wanted(
        self, sample: torch.Tensor, angle: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        return self._predict(self.control, sample, angle, batch, guidance, self.settings.scale.at(angle))

    def _clean(
        self,
        control: SanaControlNetModel,
        sample: torch.Tensor,
        angle: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
        scale: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """The clean latents (B, C, h, w) that the transformer predicts with a ControlNet at a scale, or at (B,)."""

        def flow(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return controlled_velocity(self.transformer, control, latents, time, batch, guidance, scale)

        return predict_clean(sample, trigflow_velocity(flow, sample, angle, sigma_data=1.0), angle)
