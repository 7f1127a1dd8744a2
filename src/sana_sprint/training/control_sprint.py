"""A ControlNet of a flow teacher, and a Sprint model distilled from it, to a ControlNet for one to four steps."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from sana_sprint.checkpoints.hub import find_source
from sana_sprint.training.control_distillation import ControlDistillation
from sana_sprint.training.control_teacher import open_controlled_cache
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.datasets.source import LatentSource
from sana_sprint.training.distillation import DistillationSettings
from sana_sprint.training.export import export_network, record_of
from sana_sprint.training.flow import embeds_guidance
from sana_sprint.training.identity import sources
from sana_sprint.training.loop import train
from sana_sprint.training.origin import Origin
from sana_sprint.training.settings import LoopSettings, Precision
from sana_sprint.training.sprint import DTYPES, check_teacher
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel


@dataclass(frozen=True, kw_only=True)
class SprintControlRecipe:
    """All settings of the distillation of a ControlNet at full size.

    Raises:
        ValueError: for settings that exclude each other.
    """

    teacher: str  # a folder or hub id in diffusers' layout: a pipeline, or a transformer alone
    control: str  # its ControlNet: what a recipe such as control_1.6b_1024 has left
    student: str  # as the teacher: the Sprint model that was distilled from it
    published: str  # the published model of this size, whose config a dry run takes where no teacher is at hand
    data: Path | None = None  # a cache that `sana-sprint cache-latents --control` has written
    captions: CaptionChoice
    num_layers: int  # of the ControlNet, for a dry run alone
    # Of the teacher and its ControlNet. The student's transformer is differentiated and stays in float32.
    teacher_dtype: Precision = "bf16"
    # As in `SprintRecipe`.
    gradient_checkpointing: bool = True
    loop: LoopSettings
    distillation: DistillationSettings

    def __post_init__(self) -> None:
        if self.teacher_dtype == "bf16" and self.loop.precision == "fp32":
            raise ValueError("teacher_dtype bf16 needs loop.precision bf16, which casts what goes into it; got fp32")
        if self.gradient_checkpointing and self.distillation.compile:
            raise ValueError("gradient_checkpointing and distillation.compile exclude each other: set one to false")


def sprint_control_objective(
    recipe: SprintControlRecipe,
    teacher: SanaTransformer2DModel,
    control: SanaControlNetModel,
    student: SanaTransformer2DModel,
    data: LatentSource,
) -> ControlDistillation:
    """What a recipe trains; teacher and ControlNet, given in float32, are cast once they have been copied from."""
    objective = ControlDistillation(teacher, control, student, data, recipe.distillation)
    if recipe.gradient_checkpointing:
        for network in objective.trunks():
            network.enable_gradient_checkpointing()
    for frozen in (teacher, control):
        frozen.to(DTYPES[recipe.teacher_dtype])
    return objective


def train_sprint_control(recipe: SprintControlRecipe, output: Path, device: torch.device) -> Path:
    """Distil a ControlNet; return its folder, which `SanaControlNetModel.from_pretrained` takes.

    Args:
        recipe: all settings.
        output: for the run, which goes on from what is there, and the ControlNet.
        device: where to train.

    Raises:
        ValueError: if the teacher is none that can be distilled, the student none of Sprint's, or the data are not for
            them.
        OSError: if there is no such teacher, ControlNet or student.
    """
    teacher, student = (Origin.find(name).load() for name in (recipe.teacher, recipe.student))
    check_teacher(teacher)
    if not embeds_guidance(student):
        raise ValueError(f"{recipe.student} is no Sprint model: it does not embed its guidance")
    control = SanaControlNetModel.from_pretrained(find_source(recipe.control), torch_dtype=torch.float32)
    data = open_controlled_cache(recipe.data, recipe.captions, teacher)
    # The first layer of the guidance embedding and the discriminator are drawn at random.
    torch.manual_seed(recipe.loop.seed)
    began_with = sources(data, teacher=teacher, control=control, student=student)
    objective = sprint_control_objective(recipe, teacher, control, student, data.to(device))
    run, folder = output / "run", output / "controlnet"
    average = train(objective, recipe.loop, run, "control distillation", device, sources=began_with)
    if PartialState().is_main_process:
        export_network(folder, average, record_of(recipe, {"control_distillation": run / "log.jsonl"}, device))
    PartialState().wait_for_everyone()
    return folder
