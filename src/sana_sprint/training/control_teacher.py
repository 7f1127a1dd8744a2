"""A flow teacher and a cache of latents with drawings to a ControlNet for it: what one for Sprint is distilled from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from sana_sprint.training.control import ControlObjective, train_control
from sana_sprint.training.datasets.cached import CachedLatents
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.datasets.source import LatentSource
from sana_sprint.training.export import export_network, record_of
from sana_sprint.training.flow import FlowMatchingSettings
from sana_sprint.training.identity import sources
from sana_sprint.training.origin import Origin, open_cache
from sana_sprint.training.settings import LoopSettings, Precision
from sana_sprint.training.sprint import DTYPES, check_teacher
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import Placement


@dataclass(frozen=True, kw_only=True)
class ControlRecipe:
    """All settings of the training of a flow transformer's ControlNet at full size.

    Raises:
        ValueError: for settings that exclude each other.
    """

    teacher: str  # a folder or hub id in diffusers' layout: a pipeline, or a transformer alone
    published: str  # the published model of this size, whose config a dry run takes where no teacher is at hand
    data: Path | None = None  # a cache that `sana-sprint cache-latents --control` has written
    captions: CaptionChoice
    num_layers: int  # of the ControlNet
    residual_placement: Placement = "after"
    teacher_dtype: Precision = "bf16"
    # Keeps the inputs of blocks alone and runs blocks again in the backward pass.
    gradient_checkpointing: bool = True
    loop: LoopSettings
    flow: FlowMatchingSettings

    def __post_init__(self) -> None:
        if self.teacher_dtype == "bf16" and self.loop.precision == "fp32":
            raise ValueError("teacher_dtype bf16 needs loop.precision bf16, which casts what goes into it; got fp32")
        if self.gradient_checkpointing and self.flow.compile:
            raise ValueError("gradient_checkpointing and flow.compile exclude each other: set one to false")


def open_controlled_cache(
    folder: Path | None, captions: CaptionChoice, transformer: SanaTransformer2DModel
) -> CachedLatents:
    """The cache that a transformer's ControlNet is trained on.

    Raises:
        ValueError: as `open_cache`; and if there are no drawings in it.
    """
    cache = open_cache(folder, captions, transformer)
    if cache.control is None:
        raise ValueError(
            f"{folder} holds nothing to control by: make it with sana-sprint cache-latents --control edges"
        )
    return cache


def untrained_control(recipe: ControlRecipe, teacher: SanaTransformer2DModel) -> SanaControlNetModel:
    """The ControlNet that a recipe begins with, copied from a teacher in float32."""
    return SanaControlNetModel.from_transformer(teacher, recipe.num_layers, recipe.residual_placement)


def ready_to_train(
    recipe: ControlRecipe, teacher: SanaTransformer2DModel, control: SanaControlNetModel
) -> tuple[SanaTransformer2DModel, SanaControlNetModel]:
    """The same networks, the teacher cast."""
    teacher.to(DTYPES[recipe.teacher_dtype])
    if recipe.gradient_checkpointing:
        teacher.enable_gradient_checkpointing()
        control.enable_gradient_checkpointing()
    return teacher, control


def control_objective(recipe: ControlRecipe, teacher: SanaTransformer2DModel, data: LatentSource) -> ControlObjective:
    """What a recipe trains, on a teacher given in float32."""
    networks = ready_to_train(recipe, teacher, untrained_control(recipe, teacher))
    return ControlObjective(*networks, data, recipe.flow)


def train_control_teacher(recipe: ControlRecipe, origin: Origin, output: Path, device: torch.device) -> Path:
    """Train a ControlNet; return its folder, which `SanaControlNetModel.from_pretrained` takes.

    Args:
        recipe: all settings.
        origin: where the transformer is.
        output: for the run, which goes on from what is there, and the ControlNet.
        device: where to train.

    Raises:
        ValueError: if the transformer is none that can be distilled, or the data are not for it.
    """
    teacher = origin.load()
    check_teacher(teacher)
    data = open_controlled_cache(recipe.data, recipe.captions, teacher)
    control = untrained_control(recipe, teacher)
    began_with = sources(data, teacher=teacher, start=control) | {"residual_placement": recipe.residual_placement}
    networks, run = ready_to_train(recipe, teacher, control), output / "run"
    average = train_control(*networks, data, recipe.flow, recipe.loop, run, device, began_with=began_with)
    folder = output / "controlnet"
    if PartialState().is_main_process:
        export_network(folder, average, record_of(recipe, {"control": run / "log.jsonl"}, device))
    PartialState().wait_for_everyone()
    return folder
