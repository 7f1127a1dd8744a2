"""What tests of pipelines with ControlNets have in common: a drawing, and a note of what runs."""

from typing import Any

import torch
from PIL import Image, ImageDraw

from sana_sprint import (
    SanaSprintControlNetImg2ImgPipeline,
    SanaSprintControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
)

# Each pipeline with ControlNets, and the same without.
BASES = {
    SanaSprintControlNetPipeline: SanaSprintPipeline,
    SanaSprintControlNetImg2ImgPipeline: SanaSprintImg2ImgPipeline,
}


def ring(size: int = 64) -> Image.Image:
    """A white circle on black."""
    drawing = Image.new("RGB", (size, size))
    ImageDraw.Draw(drawing).ellipse([size // 6, size // 6, size * 5 // 6, size * 5 // 6], outline="white", width=3)
    return drawing


def runs_of(module: torch.nn.Module) -> list[Any]:
    """A list that from now on gets the inputs of every run of a module."""
    runs: list[Any] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: runs.append((args, kwargs)), with_kwargs=True)
    return runs
