"""`sana-sprint bench`: cases in; times, memory, operations and agreement of ours beside diffusers out."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import size, whole_number
from sana_sprint.cli.model import DTYPES

if TYPE_CHECKING:
    from sana_sprint.bench.rows import Row
    from sana_sprint.bench.session import Settings

# Those of sana_sprint.bench, which `--help` must not import.
_MODELS = ("1.6b", "0.6b")
_CASES = ("text", "step", "decode", "picture")
_STEPS = (1, 2, 4)

_DEFAULTS = {"size": [(1024, 1024)], "rounds": 5, "model": ["1.6b"]}
_QUICK_DEFAULTS = {"size": [(256, 256)], "rounds": 3, "model": ["quick"]}
_DISAGREEMENT = 1  # exit code


def picture_size(text: str) -> tuple[int, int]:
    """Width and height in pixels from "1024" or "1024x768"."""
    return size(text if "x" in text.lower() else f"{text}x{text}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options; None stands for what --quick has another default for."""
    what = parser.add_argument_group("what to measure")
    what.add_argument("--cases", nargs="+", choices=_CASES, default=list(_CASES), help="kinds of cases (all)")
    what.add_argument("--steps", nargs="+", type=int, choices=_STEPS, help="of whole pictures (all)")
    what.add_argument("--model", nargs="+", choices=_MODELS, help="published sizes of the transformer (1.6b)")
    what.add_argument(
        "--size", nargs="+", type=picture_size, metavar="N", help="pixels of the pictures, N or WxH, of 32 (1024)"
    )
    what.add_argument("--batch", nargs="+", type=whole_number(1), default=[1], metavar="N", help="pictures at once (1)")
    what.add_argument("--quick", action="store_true", help="tiny networks and pictures of 256 pixels: under a minute")
    how = parser.add_argument_group("how to measure it")
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto: bfloat16 on CUDA, else float32)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA, else the CPU)")
    how.add_argument("--compile", action="store_true", help="transformers and decoders by torch.compile, on both sides")
    how.add_argument(
        "--float8", action="store_true", help="our transformer's products in float8 (torchao); this rounds"
    )
    how.add_argument("--rounds", type=whole_number(1), metavar="N", help="how often each side is timed (5)")
    how.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of weights and noise (%(default)s)")
    how.add_argument("--output", type=Path, metavar="DIR", help="write bench.json and a plot, bench.png, too")
    parser.set_defaults(run=run)


def read_settings(options: argparse.Namespace) -> "Settings":
    """The options with their defaults, as the library has them."""
    import torch

    from sana_sprint.bench.cases import CASES
    from sana_sprint.bench.session import Settings
    from sana_sprint.bench.twins import configs_of
    from sana_sprint.cli.model import choose_device, choose_dtype

    if options.quick and options.model is not None:
        raise ValueError("--quick and --model exclude each other: quick networks are no published ones")
    if options.steps is not None and "picture" not in options.cases:
        raise ValueError("--steps is of whole pictures: add picture to --cases")
    for name, value in (_QUICK_DEFAULTS if options.quick else _DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    steps = _STEPS if options.steps is None else options.steps
    asked = options.device
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    device = choose_device(asked)
    return Settings(
        models={name: configs_of(name) for name in dict.fromkeys(options.model)},
        cases=tuple(case for case in CASES if case.group in options.cases and case.steps in (None, *steps)),
        sizes=tuple(dict.fromkeys(options.size)),
        batches=tuple(dict.fromkeys(options.batch)),
        dtype=choose_dtype(options.dtype, device),
        device=device,
        rounds=options.rounds,
        compiles=options.compile,
        float8=options.float8,
        seed=options.seed,
    )


def run(options: argparse.Namespace) -> int:
    """Measures, prints the table, the remarks and the document, and returns 1 if results disagree, else 0."""
    with screen.quiet_libraries():
        from sana_sprint.bench import report

        if options.output is not None:
            report.check_plotting()
        settings = read_settings(options)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
        title, rows, document = _measure(settings, options.quick, options.output)
    peak = document["peak_operations_per_second"]
    legend = report.legend(peak, document["machine"], document["dtype"])
    print("\n".join([title, "", *report.table(rows, peak), "", *legend, *report.remarks(rows)]))
    print(json.dumps(document, allow_nan=False))
    if document["agrees"]:
        return 0
    screen.report("error", "ours and diffusers' results are further apart than rounding explains")
    return _DISAGREEMENT


def _measure(settings: "Settings", is_quick: bool, output: Path | None) -> "tuple[str, list[Row], dict[str, Any]]":
    """Title, rows and document, which are in the output folder too, even of the rows before one that failed."""
    from sana_sprint.bench import machine, report
    from sana_sprint.bench.session import Session
    from sana_sprint.quantisation.float8 import multiplies_in_float8

    about = machine.describe(settings.device)
    dtype = str(settings.dtype).removeprefix("torch.")
    title = f"{about['name']}, {about['threads']} threads, {dtype}{', compiled' * settings.compiles}"
    if settings.float8:
        products = "products" if multiplies_in_float8(settings.device) else "weights alone: products are slower"
        title += f", our transformer in float8 ({products})"
    if is_quick:
        title += "\nquick: tiny networks, which say nothing of the times of the published ones"
    _say(title)
    peak = machine.peak_speed(settings.dtype, settings.device, is_quick)
    about_run = {
        "dtype": dtype,
        "compiled": settings.compiles,
        "float8": settings.float8,
        "rounds": settings.rounds,
        "seed": settings.seed,
    }
    rows: list[Row] = []
    try:
        for row in Session(settings, _say).rows():
            rows.append(row)
    finally:
        document = report.document(rows, peak, quick=is_quick, machine=about, **about_run)
        if output is not None and rows:
            report.write(output, title, rows, document)
    return title, rows, document


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
