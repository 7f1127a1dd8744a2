"""A SANA checkpoint and a cache of latents to a flow model that can be distilled: a teacher of SANA-Sprint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from sana_sprint.checkpoints.recognise import FLOW_SHIFT
from sana_sprint.checkpoints.transformer_config import TEACHER_TIMESTEP_SCALE
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.export import export, record_of
from sana_sprint.training.flow import FlowMatchingSettings, train_flow
from sana_sprint.training.loop import Validation
from sana_sprint.training.origin import Origin, open_cache, with_norms
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.sprint import PROMPTS
from sana_sprint.transformer.model import SanaTransformer2DModel


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """All settings of a teacher's training at full size.

    Raises:
        ValueError: for settings that exclude each other.
    """

    start: str  # a folder or hub id in diffusers' layout: a pipeline, or a transformer alone
    published: str  # the published model of this size, whose config a dry run takes where no start is at hand
    data: Path | None = None  # a cache that `sana-sprint cache-latents` has written
    captions: CaptionChoice
    # Keeps the inputs of blocks alone and runs blocks again in the backward pass.
    gradient_checkpointing: bool = True
    loop: LoopSettings
    flow: FlowMatchingSettings
    prompts: tuple[str, ...] = PROMPTS  # of the pictures that show how far it is

    def __post_init__(self) -> None:
        if self.gradient_checkpointing and self.flow.compile:
            raise ValueError("gradient_checkpointing and flow.compile exclude each other: set one to false")


def make_teacher(recipe: TeacherRecipe, start: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The start as a network that is told a time in [0, 1], with normalised queries and keys.

    Its config says so: 1000, from which diffusers' pipelines count, times `timestep_scale` is 1.
    """
    transformer = with_norms(start)
    transformer.register_to_config(timestep_scale=TEACHER_TIMESTEP_SCALE)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def train_teacher(
    recipe: TeacherRecipe, origin: Origin, output: Path, device: torch.device, validate: Validation | None = None
) -> Path:
    """Train a teacher; return the folder of the checkpoint. Arguments and errors are as for `train_sprint`."""
    transformer = make_teacher(recipe, origin.load())
    data = open_cache(recipe.data, recipe.captions, transformer)
    run = output / "run"
    average = train_flow(transformer, data, recipe.flow, recipe.loop, run, device, validate)
    checkpoint = output / "checkpoint"
    if PartialState().is_main_process:
        record = record_of(recipe, {"flow": run / "log.jsonl"}, device)
        export(checkpoint, average, "flow-dpm_solver", origin.pipeline, record, FLOW_SHIFT)
    PartialState().wait_for_everyone()
    return checkpoint
