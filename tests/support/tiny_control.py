"""Tiny ControlNets whose exits are open, and random latents with random drawings."""

from dataclasses import replace
from typing import Any

import torch
from tiny_training import tiny_data

from sana_sprint.training.flow import FlowData
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel


def controlled_data(size: int = 16) -> FlowData:
    """Random latents, captions and drawings."""
    data = tiny_data(size)
    return replace(data, controls=torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(7)))


def open_control(transformer: SanaTransformer2DModel, seed: int = 4, **options: Any) -> SanaControlNetModel:
    """A ControlNet of one block for a transformer, whose ways in and out are no longer zero."""
    control = SanaControlNetModel.from_transformer(transformer, num_layers=1, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in (control.input_block, *control.controlnet_blocks):
            for parameter in linear.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return control
