"""Latents with captions and latents of drawings to a ControlNet for a flow transformer that stays as it is.

B batch, C channels, h w latent grid. Flow time runs from 0 clean to 1 noise.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sana_sprint.training.datasets.source import LatentBatch, LatentSource
from sana_sprint.training.flow import (
    FlowMatching,
    FlowMatchingSettings,
    embeds_guidance,
    predict_velocity,
    prepared,
    time_guidance_embedding,
)
from sana_sprint.training.identity import sources
from sana_sprint.training.loop import Validation, train
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import ControlSamples


def control_residuals(
    control: SanaControlNetModel,
    latents: torch.Tensor,
    time: torch.Tensor,
    batch: LatentBatch,
    guidance: torch.Tensor,
) -> ControlSamples:
    """What a ControlNet adds for a batch's drawings, at guidance scales (B,) if it embeds them."""
    assert batch.control is not None
    return control(
        latents,
        encoder_hidden_states=batch.caption,
        timestep=time,
        controlnet_cond=batch.control,
        encoder_attention_mask=batch.mask,
        guidance=guidance * control.config.guidance_embeds_scale if embeds_guidance(control) else None,
        return_dict=False,
    )[0]


def controlled_velocity(
    transformer: SanaTransformer2DModel,
    control: SanaControlNetModel,
    latents: torch.Tensor,
    time: torch.Tensor,
    batch: LatentBatch,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """Velocity (B, C, h, w) in float32 of a transformer with a ControlNet, guided at (B,) where they embed that."""
    residuals = control_residuals(control, latents, time, batch, guidance)
    own = guidance if embeds_guidance(transformer) else None
    return predict_velocity(transformer, latents, time, batch.caption, batch.mask, own, residuals)


class ControlObjective(FlowMatching[SanaControlNetModel]):
    """Flow matching by a transformer that stays as it is, and a ControlNet that learns.

    Guidance is 1 throughout: the velocity is that of the data, and guidance is left to whoever draws.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        control: SanaControlNetModel,
        data: LatentSource,
        settings: FlowMatchingSettings,
    ) -> None:
        super().__init__(data, settings)
        self.transformer = transformer.eval().requires_grad_(False)
        self.control = control
        if embeds_guidance(control):
            # At a single scale there is nothing to learn about scales, and much to forget.
            time_guidance_embedding(control).guidance_embedder.requires_grad_(False)

    def velocity(self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch) -> torch.Tensor:
        return controlled_velocity(self.transformer, self.control, latents, time, batch, torch.ones_like(time))

    def averaged(self) -> SanaControlNetModel:
        return self.control


def train_control(
    transformer: SanaTransformer2DModel,
    control: SanaControlNetModel,
    data: LatentSource,
    settings: FlowMatchingSettings,
    loop: LoopSettings,
    folder: Path,
    device: torch.device,
    validate: Validation | None = None,
    began_with: Mapping[str, str] | None = None,
) -> SanaControlNetModel:
    """Train a ControlNet for a transformer; the data must hold drawings, the rest is as for `train`.

    `began_with` are the sources of networks that have been cast since; None takes those of the networks as they are.
    """
    began_with = began_with or sources(data, teacher=transformer, start=control)
    networks = prepared(transformer, settings), prepared(control, settings)
    objective = ControlObjective(*networks, data.to(device), settings)
    return train(objective, loop, folder, "control", device, validate, began_with).requires_grad_(True)
