"""A flow teacher and a cache of latents to a SANA-Sprint checkpoint that draws in one to four steps."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.datasets.source import LatentSource
from sana_sprint.training.distillation import Distillation, DistillationSettings
from sana_sprint.training.export import export, record_of
from sana_sprint.training.identity import sources
from sana_sprint.training.loop import Validation, train
from sana_sprint.training.origin import Origin, open_cache
from sana_sprint.training.settings import LoopSettings, Precision
from sana_sprint.transformer.model import SanaTransformer2DModel

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

PROMPTS = (
    "a tiny astronaut hatching from an egg on the moon",
    "a red cube on top of a blue sphere, in a room with white walls",
    "a portrait of an old fisherman in the rain, oil on canvas",
    "three cats beside a sign that says hello",
)


@dataclass(frozen=True, kw_only=True)
class SprintRecipe:
    """All settings of a distillation at full size.

    Raises:
        ValueError: for settings that exclude each other.
    """

    teacher: str  # a folder or hub id in diffusers' layout: a pipeline, or a transformer alone
    published: str  # the published model of this size, whose config a dry run takes where no teacher is at hand
    data: Path | None = None  # a cache that `sana-sprint cache-latents` has written
    captions: CaptionChoice
    teacher_dtype: Precision = "bf16"
    # Keeps the inputs of blocks alone and runs blocks again: less than a tenth of the activations, a fifth more time.
    gradient_checkpointing: bool = True
    loop: LoopSettings
    distillation: DistillationSettings
    prompts: tuple[str, ...] = PROMPTS  # of the pictures that show how far it is

    def __post_init__(self) -> None:
        if self.teacher_dtype == "bf16" and self.loop.precision == "fp32":
            raise ValueError("teacher_dtype bf16 needs loop.precision bf16, which casts what goes into it; got fp32")
        if self.gradient_checkpointing and self.distillation.compile:
            raise ValueError("gradient_checkpointing and distillation.compile exclude each other: set one to false")


class CheckpointedDistillation(Distillation):
    """The same losses in less memory: networks keep what goes into their blocks alone, and run these again."""

    def __init__(
        self,
        teacher: SanaTransformer2DModel,
        data: LatentSource,
        settings: DistillationSettings,
        student: SanaTransformer2DModel | None = None,
    ) -> None:
        super().__init__(teacher, data, settings, student)
        for network in self.trunks():
            network.enable_gradient_checkpointing()


def sprint_objective(recipe: SprintRecipe, teacher: SanaTransformer2DModel, data: LatentSource) -> Distillation:
    """What a recipe trains; the teacher, given in float32, is cast once the student has been copied from it."""
    kind = CheckpointedDistillation if recipe.gradient_checkpointing else Distillation
    objective = kind(teacher, data, recipe.distillation)
    objective.teacher.to(DTYPES[recipe.teacher_dtype])
    return objective


def check_teacher(teacher: SanaTransformer2DModel) -> None:
    """Refuse a plain SANA model.

    Raises:
        ValueError: for one that knows another time than that in [0, 1], or does not normalise queries and keys.
    """
    config = teacher.config
    if config.timestep_scale == 1.0 and not config.guidance_embeds:
        raise ValueError(
            "the teacher was trained with times from 0 to 1000 (its timestep_scale is 1 and not 0.001): train a teacher"
            " from it first, with sana-sprint train teacher_1.6b_1024 or teacher_0.6b_1024"
        )
    if config.qk_norm is None:
        raise ValueError(
            "the teacher does not normalise queries and keys, and the student's derivative would explode: train a"
            " teacher from it first, with sana-sprint train teacher_1.6b_1024 or teacher_0.6b_1024"
        )


def train_sprint(
    recipe: SprintRecipe, origin: Origin, output: Path, device: torch.device, validate: Validation | None = None
) -> Path:
    """Distil a teacher; return the folder of the checkpoint.

    Args:
        recipe: all settings.
        origin: where the teacher is.
        output: for the run, which goes on from what is there, and the checkpoint. If the teacher is in a pipeline, so
            is the result.
        device: where to train.
        validate: as for `train`.

    Raises:
        ValueError: if the teacher is none that can be distilled, or the data are not for it.
    """
    teacher = origin.load()
    check_teacher(teacher)
    data = open_cache(recipe.data, recipe.captions, teacher)
    # The first layer of the guidance embedding and the discriminator are drawn at random.
    torch.manual_seed(recipe.loop.seed)
    began_with = sources(data, teacher=teacher)
    objective = sprint_objective(recipe, teacher, data.to(device))
    run = output / "run"
    student = train(objective, recipe.loop, run, "distillation", device, validate, began_with)
    checkpoint = output / "checkpoint"
    if PartialState().is_main_process:
        record = record_of(recipe, {"distillation": run / "log.jsonl"}, device)
        export(checkpoint, student, "scm", origin.pipeline, record)
    PartialState().wait_for_everyone()
    return checkpoint
