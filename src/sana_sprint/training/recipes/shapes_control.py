"""A ControlNet for the shapes checkpoint, by edges: its three stages; under an hour on two CPU cores.

It needs two results of a run of the recipe shapes: the flow transformer with its guidance built in, and the checkpoint
that was distilled from it.
"""

from dataclasses import dataclass, field, replace

from sana_sprint.training.control_pixels import PixelSettings
from sana_sprint.training.distillation import AngleDistribution, DistillationSettings
from sana_sprint.training.flow import FlowMatchingSettings
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.recipes import shapes
from sana_sprint.training.settings import LoopSettings


def _distillation_settings() -> DistillationSettings:
    settings = shapes.RECIPE.distillation
    # Ways in and out are no matrices of blocks.
    student = replace(settings.student, learning_rate=4e-4, matrix_learning_rate=5e-4)
    settings = replace(settings, student=student, max_time_share=0.5)
    # Edges say nearly all of such a picture, and the captions the rest: its latents are what to predict, also from what
    # an earlier step has drawn.
    return shapes.at_constant_rates(replace(settings, reconstruction_weight=10.0, simulated_share=0.7))


def _pixel_settings() -> PixelSettings:
    return PixelSettings(
        optimiser=OptimiserSettings(
            learning_rate=2e-4, matrix_learning_rate=5e-4, warmup_steps=20, weight_decay=0.0, clip_norm=1.0
        ),
        # Where the later ones of two to four steps begin.
        later_angles=AngleDistribution(mean=0.1, std=0.6),
    )


@dataclass(frozen=True, kw_only=True)
class ShapesControlRecipe:
    """All settings; the embedded ControlNet has them, with the student that was embedded then."""

    teacher: str = "runs/shapes/guidance/transformer"  # a folder, or hub id, of the transformer
    student: str = "runs/shapes/checkpoint"  # a pipeline's folder, or embedded
    picture_size: int = shapes.RECIPE.picture_size
    num_pictures: int = shapes.RECIPE.num_pictures
    pool_seed: int = 3
    max_caption_tokens: int = shapes.RECIPE.max_caption_tokens
    # Share of the captions that name colours only, as they come when edges say the rest.
    colour_caption_share: float = 0.6
    # Of five; with 3 it would be larger than 4 MB in bfloat16.
    num_layers: int = 2
    control: FlowMatchingSettings = field(
        default_factory=lambda: FlowMatchingSettings(
            optimiser=OptimiserSettings(learning_rate=1e-3, matrix_learning_rate=1e-3, warmup_steps=100)
        )
    )
    control_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=2400, batch_size=64, ema_decay=0.998, seed=30)
    )
    distillation: DistillationSettings = field(default_factory=_distillation_settings)
    distillation_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=600, batch_size=64, ema_decay=0.995, seed=31)
    )
    pixels: PixelSettings = field(default_factory=_pixel_settings)
    pixels_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=600, batch_size=64, ema_decay=0.99, seed=50)
    )


RECIPE = ShapesControlRecipe()


def shortened(recipe: ShapesControlRecipe, steps: int, num_pictures: int, batch_size: int = 8) -> ShapesControlRecipe:
    """The same recipe with so few steps, on so few pictures, that it shows that everything runs, and nothing more."""
    distillation, pixels = recipe.distillation, recipe.pixels
    return replace(
        recipe,
        num_pictures=num_pictures,
        control=replace(recipe.control, optimiser=replace(recipe.control.optimiser, warmup_steps=1), compile=False),
        control_loop=replace(recipe.control_loop, steps=steps, batch_size=batch_size),
        distillation=replace(
            distillation,
            student=replace(distillation.student, warmup_steps=1),
            fake_score=replace(distillation.fake_score, warmup_steps=1),
            compile=False,
        ),
        distillation_loop=replace(recipe.distillation_loop, steps=steps, batch_size=batch_size),
        pixels=replace(pixels, optimiser=replace(pixels.optimiser, warmup_steps=1), compile=False),
        pixels_loop=replace(recipe.pixels_loop, steps=steps, batch_size=batch_size),
    )
