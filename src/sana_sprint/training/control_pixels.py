"""A ControlNet of a distilled transformer to one whose decoded pictures lie where the drawing says.

The squared error of latents counts what the decoder hardly shows as much as what moves an edge. So this asks for the
pictures: of a first step, and of a later one from what the first has drawn. What drawing and caption leave open would
come out as a mean of all that it may be, so they must leave nothing open; photographs would blur.

B batch, C channels, h w latent grid, H W picture. Latents have unit variance; angles are TrigFlow's, in radians.
"""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sana_sprint.autoencoder.model import AutoencoderDC
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
class PixelSettings:
    """The objective."""

    optimiser: OptimiserSettings
    # Of the first step, which begins at noise alone whatever angle a timetable gives it; even between the two.
    first_angles: tuple[float, float] = (1.54, math.pi / 2)
    later_angles: AngleDistribution
    sigma_data: float = 0.5  # shifts the later angles only
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    use_muon: bool = True  # for the matrices of the blocks, which must be whole then: no FSDP
    compile: bool = True


class PixelObjective(Objective[SanaControlNetModel]):
    """A ControlNet learns to draw, in a first step and in a later one, what the decoder makes of the data's latents.

    Args:
        transformer: the distilled one, which stays as it is.
        control: its ControlNet, of which a copy learns.
        vae: what decodes the latents, and stays as it is.
        data: with drawings, and captions that leave no colour open.
        settings: where the steps begin, and how to learn.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        control: SanaControlNetModel,
        vae: AutoencoderDC,
        data: LatentSource,
        settings: PixelSettings,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.data = data
        self.transformer = transformer.eval().requires_grad_(False)
        self.student = copy.deepcopy(control).train().requires_grad_(True)
        self.vae = vae.eval().requires_grad_(False)
        for network in (self.transformer, self.student):
            use_training_kernels(network)
        self._draw = torch.compile(self._clean) if settings.compile else self._clean
        self._show = torch.compile(self._decoded) if settings.compile else self._decoded

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
        with torch.no_grad():
            wanted = self._show(batch.clean)
        low, high = settings.first_angles
        noise, angle = draws.normal(batch.clean.shape[1:]), low + (high - low) * draws.uniform()
        drawn = self._draw(noise, angle, batch, guidance)
        first = F.l1_loss(self._show(drawn), wanted)

        angle = settings.later_angles.draw(draws, settings.sigma_data)
        sample = add_noise(drawn.detach(), draws.normal(drawn.shape[1:]), angle)
        later = F.l1_loss(self._show(self._draw(sample, angle, batch, guidance)), wanted)
        return {"loss": first + later, "first": first, "later": later}

    def _clean(
        self, sample: torch.Tensor, angle: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        """The clean latents (B, C, h, w) that the transformer predicts with the ControlNet."""

        def flow(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return controlled_velocity(self.transformer, self.student, latents, time, batch, guidance)

        return predict_clean(sample, trigflow_velocity(flow, sample, angle, sigma_data=1.0), angle)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in float32, in about [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0].float()
