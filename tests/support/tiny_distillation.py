"""A tiny flow teacher in its pipeline, and a recipe that distils it in two steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sana_sprint import SanaSprintPipeline, SanaTransformer2DModel
from sana_sprint.cli.main import main
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.distillation import DistillationSettings
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.recipes import find_recipe
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.sprint import SprintRecipe
from sana_sprint.training.teacher import TeacherRecipe

CAPTIONS = ("a red circle", "a blue square", "a tiny astronaut", "three yellow triangles", "a green star", "an egg")
LOOP = LoopSettings(
    steps=2, batch_size=4, accumulation=2, precision="fp32", ema_decay=0.5, checkpoint_every=1, log_every=1, seed=5
)
OPTIMISER = OptimiserSettings(learning_rate=1e-2, warmup_steps=1)


def sprint_recipe(teacher: Path, data: Path, **changes: Any) -> SprintRecipe:
    """The published recipe with tiny numbers."""
    recipe = find_recipe("sprint_0.6b_1024")
    distillation = DistillationSettings(
        student=OPTIMISER, discriminator=OPTIMISER, head_blocks=(0, 1), tangent_warmup_steps=2, compile=False
    )
    settings = {
        "teacher": str(teacher),
        "data": data,
        "captions": CaptionChoice(),
        "teacher_dtype": "fp32",
        "loop": LOOP,
        "distillation": distillation,
        "prompts": CAPTIONS[:2],
        **changes,
    }
    return replace(recipe, **settings)


def teacher_recipe(start: Path, data: Path) -> TeacherRecipe:
    """The published recipe with tiny numbers."""
    recipe = find_recipe("teacher_0.6b_1024")
    flow = replace(recipe.flow, optimiser=OPTIMISER)
    return replace(recipe, start=str(start), data=data, captions=CaptionChoice(), loop=LOOP, flow=flow)


def save_teacher(parts: dict[str, Any], folder: Path) -> Path:
    """Write a pipeline's parts with a flow model that can be distilled: a time in [0, 1], normalised queries."""
    torch.manual_seed(3)
    config = parts["transformer"].config
    teacher = SanaTransformer2DModel.from_config(config, guidance_embeds=False, timestep_scale=0.001)
    SanaSprintPipeline(**{**parts, "transformer": teacher}).save_pretrained(folder)
    return folder


def save_cache(teacher: Path, folder: Path, *more: str) -> Path:
    """Have a pipeline's encoders make a cache, of pictures of random dots with a caption each; returns its folder.

    `more` are further options of the command.
    """
    source, cache = folder / "pictures", folder / "cache"
    source.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        dots = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(dots).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(caption, encoding="utf-8")
    options = ["--model", str(teacher), "--output", str(cache), "--size", "64", "--captions-tokens", "40"]
    assert main(["cache-latents", str(source), *options, "--device", "cpu", *more]) == 0
    return cache
