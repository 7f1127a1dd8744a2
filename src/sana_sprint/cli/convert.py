"""`sana-sprint convert`: a checkpoint and a layout in; the checkpoint in that layout, and what was done, out."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import amount
from sana_sprint.sizes import readable_bytes

if TYPE_CHECKING:
    from sana_sprint.checkpoints.convert import Conversion, Report
    from sana_sprint.checkpoints.evidence import Ambiguity

# Those of checkpoints/, which `--help` must not import.
LAYOUTS = ("diffusers", "original")
DTYPES = ("bf16", "fp16", "fp32")
KINDS = ("transformer", "autoencoder", "controlnet")
SCHEDULERS = ("scm", "flow-dpm_solver", "flow-euler")
IMAGE_SIZES = (512, 1024, 2048, 4096)
PIXELS_PER_CELL = 32


def setting(text: str) -> tuple[str, Any]:
    """Name and value from "sample_size=16"; a value that is no JSON is text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier() or name.startswith("_"):
        raise argparse.ArgumentTypeError(f"wanted NAME=VALUE, such as sample_size=16, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_settings(parser: argparse._ActionsContainer) -> None:
    """Declares the options for what tensors cannot tell; of `inspect` too."""
    parser.add_argument(
        "--image-size", type=int, choices=IMAGE_SIZES, help="pixels that a transformer was trained for (from its name)"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an entry of the config, such as timestep_scale=0.001; may be given several times",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training snapshot")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Entries of the config that the options give."""
    size = {"sample_size": options.image_size // PIXELS_PER_CELL} if options.image_size else {}
    return {**size, **dict(options.settings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("input", metavar="INPUT", help="file, index of several, folder, or file of the hub")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder; for --to original a .pth or .safetensors")
    parser.add_argument("--to", choices=LAYOUTS, default="diffusers", help="layout of the output (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="number format (that of INPUT)")
    parser.add_argument("--shard-size", type=amount, metavar="SIZE", help="the most that a file may hold (5GB)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")

    known = parser.add_argument_group("what the tensors cannot tell")
    add_settings(known)
    known.add_argument(
        "--kind", choices=KINDS, help="what INPUT must hold; transformer takes the base from a ControlNet's file"
    )

    whole = parser.add_argument_group("a whole pipeline")
    whole.add_argument("--full-pipeline", action="store_true", help="write one, with the parts below")
    whole.add_argument("--vae", metavar="PATH", help="DC-AE, in either layout")
    whole.add_argument("--text-encoder", metavar="PATH", help="folder of Gemma-2 and its tokenizer")
    whole.add_argument("--scheduler", choices=SCHEDULERS, help="of the pipeline (the one it was trained for)")
    parser.set_defaults(run=run)


def choose_job(options: argparse.Namespace) -> "Conversion":
    """The whole job; fetches what is on the hub, unless the options contradict each other."""
    from sana_sprint.checkpoints import convert
    from sana_sprint.checkpoints.hub import find_source
    from sana_sprint.checkpoints.staging import check_destination

    job = convert.Conversion(
        source=Path(options.input),
        output=options.output,
        to=options.to,
        dtype=convert.DTYPES[options.dtype] if options.dtype else None,
        shard_bytes=options.shard_size or convert.SHARD_BYTES,
        ema=options.ema,
        kind=options.kind,
        settings=settings_of(options),
        full_pipeline=options.full_pipeline,
        vae=Path(options.vae) if options.vae else None,
        text_encoder=Path(options.text_encoder) if options.text_encoder else None,
        scheduler=options.scheduler,
        force=options.force,
    )
    convert.check(job)
    if not job.force:
        check_destination(job.output.expanduser(), force=False)
    return replace(
        job,
        source=find_source(options.input),
        vae=find_source(options.vae) if options.vae else None,
        text_encoder=find_source(options.text_encoder) if options.text_encoder else None,
    )


def describe_doubts(doubts: "Sequence[Ambiguity]") -> list[str]:
    """A line for each setting that was guessed, with how to say it."""
    return [
        f"{doubt.question}: took {doubt.chosen}; --set {doubt.setting}=.. says {' or '.join(map(str, doubt.others))}"
        for doubt in doubts
    ]


def describe_report(report: "Report", layout: str) -> list[str]:
    """What was done, in lines."""
    source = report.source
    lines = [
        f"{source.name}: {source.num_parameters:,} parameters, {source.layout} -> {layout}",
        f"wrote {report.output}: {readable_bytes(report.num_bytes)} in {report.seconds:.1f} s",
    ]
    if source.aside and layout == "diffusers":
        lines.append(f"kept beside the model: {', '.join(source.aside)}")
    for names, reason in ((source.dropped, "can be recomputed"), (source.elsewhere, "belong to another model")):
        if names:
            lines.append(f"left out, {reason}: {len(names)} tensors, {names[0]} first")
    lines += [f"note: {line}" for line in describe_doubts(source.doubts)]
    if report.vae:
        lines += [f"note on the vae, {doubt}, in a conversion of its own" for doubt in report.vae.doubts]
    return lines


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """Inside, a plain `kill` unwinds the program as an error does, so that what is half written is cleared away."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: argparse.Namespace) -> None:
    """Converts what the options ask for and prints what was done."""
    from tqdm import tqdm

    with screen.quiet_libraries():
        from sana_sprint.checkpoints.convert import convert

        job = choose_job(options)
        bars: list[tqdm] = []

        def start(num_bytes: int) -> Callable[[int], object]:
            bars.append(tqdm(total=num_bytes, desc="writing", unit="B", unit_scale=True, disable=None, leave=False))
            return bars[0].update

        try:
            with _tidy_when_terminated():
                report = convert(job, progress=start)
        finally:
            for bar in bars:
                bar.close()
    print("\n".join(describe_report(report, options.to)))
