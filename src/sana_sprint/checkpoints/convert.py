"""A checkpoint of one layout to another: recognised, planned, and written tensor by tensor."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.assembly import (
    SchedulerName,
    TextEncoder,
    choose_scheduler,
    find_text_encoder,
    write_pipeline_index,
    write_scheduler,
)
from sana_sprint.checkpoints.entries import Entry
from sana_sprint.checkpoints.inspect import CLASSES, Inspection, describe, identify, plan_for, refuse_inexact
from sana_sprint.checkpoints.reader import COMPONENTS, Checkpoint, open_checkpoint
from sana_sprint.checkpoints.recognise import Family
from sana_sprint.checkpoints.rules import Kind, Layout
from sana_sprint.checkpoints.staging import staged
from sana_sprint.checkpoints.writer import (
    ORIGINAL_ENDINGS,
    entries_of,
    model_config,
    write_model,
    write_original,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 5 * 10**9

# Headers, configs and indices, which the check for free space counts with the weights.
_OVERHEAD_BYTES = 2**22


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert, to what.

    Attributes:
        source: a file, the index of several, or a folder; of a pipeline's folder, the transformer or what `kind` says.
        output: a folder to be made, or for the original layout a file that ends in .pth or .safetensors.
        to: the layout wanted. It may be the one that `source` has, to change dtype or shards.
        dtype: of the weights; None leaves them as they are.
        shard_bytes: the most that one file of a folder may hold.
        ema: take the averaged weights of a training snapshot.
        kind: what `source` must hold; "transformer" takes the base from a ControlNet's file. None takes anything.
        settings: entries of the config that tensors cannot tell.
        full_pipeline: write a whole pipeline, with the autoencoder and text encoder below.
        vae: DC-AE, in either layout.
        text_encoder: folder of a Gemma-2 and its tokenizer, or a pipeline's.
        scheduler: of the pipeline; None for the one the model was trained for.
        force: replace `output`.
    """

    source: Path
    output: Path
    to: Layout = "diffusers"
    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES
    ema: bool = False
    kind: Kind | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    full_pipeline: bool = False
    vae: Path | None = None
    text_encoder: Path | None = None
    scheduler: SchedulerName | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done: the source as it was found, the vae of a full pipeline likewise, and what was written."""

    source: Inspection
    vae: Inspection | None
    output: Path
    num_bytes: int  # of tensors and copied files
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Model:
    """One model, ready to be written."""

    checkpoint: Checkpoint
    family: Family
    entries: Sequence[Entry]
    aside: Sequence[Entry]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in (*self.entries, *self.aside))

    @property
    def class_name(self) -> str:
        return CLASSES[self.family.kind]

    def write(self, folder: Path, shard_bytes: int, advance: Callable[[int], object]) -> None:
        config = model_config(self.class_name, self.family.config)
        write_model(folder, config, self.entries, self.aside, shard_bytes=shard_bytes, advance=advance)


def convert(job: Conversion, *, progress: Callable[[int], Callable[[int], object]] | None = None) -> Report:
    """Carries out a conversion. Memory stays at a few tensors, whatever the size of the file.

    Args:
        job: what to convert, to what.
        progress: called with the number of bytes to be written, returns what is told of bytes written.

    Raises:
        FileNotFoundError: if an input is missing.
        ValueError: in one line, for inputs that are damaged, unknown or incomplete, and options that do not fit.
        OSError: if the output cannot be written. Whatever is raised, there is no output then.
    """
    start = time.monotonic()
    check(job)
    with ExitStack() as stack:
        component = COMPONENTS[job.kind or "transformer"]
        checkpoint = stack.enter_context(open_checkpoint(job.source, ema=job.ema, component=component))
        main = _prepare(checkpoint, job.settings, job.to, job.dtype, job.kind)
        inputs = checkpoint.paths
        vae, text_encoder = None, None
        if job.full_pipeline:
            vae, text_encoder = _companions(job, main.family, stack)
            inputs += [*vae.checkpoint.paths, *text_encoder.model_files, *text_encoder.tokenizer_files]
        _spare(inputs, job.output)
        num_bytes = main.num_bytes + (vae.num_bytes if vae else 0) + (text_encoder.num_bytes if text_encoder else 0)
        with staged(job.output, force=job.force, num_bytes=num_bytes + _OVERHEAD_BYTES) as place:
            for model in (main, vae):
                if model:
                    model.checkpoint.check_data()
            advance = progress(num_bytes) if progress else _ignore
            if job.to == "original":
                write_original(place, main.entries, advance)
            elif vae and text_encoder:
                _write_pipeline(place, job, main, vae, text_encoder, advance)
            else:
                main.write(place, job.shard_bytes, advance)
        source = describe(checkpoint, main.family)
        described_vae = describe(vae.checkpoint, vae.family) if vae else None
    seconds = time.monotonic() - start
    return Report(source=source, vae=described_vae, output=job.output, num_bytes=num_bytes, seconds=seconds)


def _ignore(num_bytes: int) -> None:
    pass


def check(job: Conversion) -> None:
    """Raises ValueError for options that contradict each other, or would have no effect; reads nothing."""
    is_file = job.output.suffix in ORIGINAL_ENDINGS
    if job.to == "original" and not is_file:
        raise ValueError(f"the original layout is one file: {job.output} must end in {', '.join(ORIGINAL_ENDINGS)}")
    if job.to == "diffusers" and is_file:
        raise ValueError(f"diffusers' layout is a folder: {job.output} must not end in {job.output.suffix}")
    if job.shard_bytes < 1:
        raise ValueError(f"a shard must hold at least one byte, got {job.shard_bytes}")
    if job.to == "original" and (job.full_pipeline or job.shard_bytes != SHARD_BYTES):
        raise ValueError("the original layout is one file of one model: it has no shards and no pipeline")
    if job.full_pipeline and not (job.vae and job.text_encoder):
        raise ValueError("a full pipeline is made of a transformer, a vae and a text encoder: name all three")
    if not job.full_pipeline and (job.vae or job.text_encoder or job.scheduler):
        raise ValueError("vae, text encoder and scheduler are parts of a full pipeline, which was not asked for")


def _spare(inputs: Sequence[Path], output: Path) -> None:
    """Raises ValueError if the output is one of the input's files, or a folder around one."""
    destination = output.expanduser().resolve()
    for file in inputs:
        # The file of a link, and the link.
        if any(place.is_relative_to(destination) for place in (file.resolve(), file.parent.resolve() / file.name)):
            raise ValueError(f"{file} would be replaced by what is made of it: name another output than {output}")


def _prepare(
    checkpoint: Checkpoint, settings: Mapping[str, Any], to: Layout, dtype: torch.dtype | None, kind: Kind | None
) -> _Model:
    family = identify(checkpoint, settings, kind)
    plan = plan_for(checkpoint, family, to)
    refuse_inexact(checkpoint, family, plan)
    return _Model(
        checkpoint=checkpoint,
        family=family,
        entries=entries_of(plan.moves, checkpoint, dtype),
        aside=entries_of(plan.aside, checkpoint, dtype),
    )


def _companions(job: Conversion, family: Family, stack: ExitStack) -> tuple[_Model, TextEncoder]:
    """Autoencoder and text encoder of a whole pipeline. Raises ValueError if they do not fit the transformer."""
    assert job.vae
    assert job.text_encoder
    if family.kind != "transformer":
        raise ValueError(f"a full pipeline is made around a transformer, {job.source} is a {family.name}")
    choose_scheduler(family, job.scheduler)
    opened = stack.enter_context(open_checkpoint(job.vae, component=COMPONENTS["autoencoder"]))
    vae = _prepare(opened, {}, "diffusers", None, "autoencoder")
    latents, channels = vae.family.config["latent_channels"], family.config["in_channels"]
    if latents != channels:
        raise ValueError(f"the transformer works on latents of {channels} channels, those of {job.vae} have {latents}")
    return vae, find_text_encoder(job.text_encoder, family.config["caption_channels"])


def _write_pipeline(
    folder: Path,
    job: Conversion,
    main: _Model,
    vae: _Model,
    text_encoder: TextEncoder,
    advance: Callable[[int], object],
) -> None:
    folder.mkdir()
    main.write(folder / "transformer", job.shard_bytes, advance)
    vae.write(folder / "vae", job.shard_bytes, advance)
    text_encoder.copy(folder, advance)
    name = choose_scheduler(main.family, job.scheduler)
    scheduler = write_scheduler(folder / "scheduler", name, main.family.flow_shift)
    classes = {
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", "Gemma2Model"),
        "tokenizer": ("transformers", text_encoder.tokenizer_class),
        "transformer": ("diffusers", main.class_name),
        "vae": ("diffusers", vae.class_name),
    }
    write_pipeline_index(folder, name, classes)
