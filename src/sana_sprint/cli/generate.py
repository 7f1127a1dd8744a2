"""`sana-sprint generate`: prompts and options in; pictures as PNG files, and where they lie, out."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import (
    CONTROLS,
    LARGEST_SEED,
    NO_CONTROL,
    QUANTIZATIONS,
    amount,
    angles,
    number,
    share,
    size,
    whole_number,
)
from sana_sprint.cli.control import DEFAULT_CONTROL, DEFAULT_SCALE, choose_guide
from sana_sprint.cli.drawing import Drawn, Job, Request, draw
from sana_sprint.cli.files import prepare_output
from sana_sprint.cli.inputs import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH, choose_start
from sana_sprint.cli.model import DTYPES, EMBEDDED, FLOW_STEPS, SPRINT_STEPS
from sana_sprint.cli.records import Picture, Record, Settings, read_record

_DEFAULT_GUIDANCE = 4.5  # that of the pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options; their defaults are None, which tells `--like` that nothing was given."""
    what = parser.add_argument_group("what to draw")
    what.add_argument("prompts", metavar="PROMPT", nargs="*", help="text of a picture; several draw several")
    what.add_argument("--prompts", dest="prompts_file", metavar="FILE", help="one prompt a line; - is standard input")
    what.add_argument(
        "--like",
        type=Path,
        metavar="FILE.png",
        help="draw this picture or sheet again, bit for bit; prompts and options beside it replace what it stored",
    )
    what.add_argument("--num-images", type=whole_number(1), metavar="N", help="pictures for each prompt (1)")
    what.add_argument(
        "--seed", type=whole_number(0), metavar="N", help="seed of each prompt's first picture, its next has N+1 (0)"
    )

    start = parser.add_argument_group("what to start from")
    start.add_argument("--init-image", type=Path, metavar="FILE", help="a picture, instead of noise alone")
    start.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white where that picture is to be drawn anew, black where it is kept, bit for bit; of the same size",
    )
    start.add_argument(
        "--strength",
        type=share,
        metavar="X",
        help="how much is new, from 0, nothing, to 1, from noise alone"
        f" ({DEFAULT_STRENGTH}, and {DEFAULT_MASKED_STRENGTH} with --mask)",
    )

    follow = parser.add_argument_group("what to follow")
    follow.add_argument(
        "--control-image", type=Path, metavar="FILE", help="a picture whose lines a ControlNet follows, or a drawing"
    )
    follow.add_argument(
        "--control",
        choices=(*CONTROLS, NO_CONTROL),
        help=f"what is found in that picture; {NO_CONTROL}: it is the drawing already ({DEFAULT_CONTROL})",
    )
    follow.add_argument(
        "--controlnet",
        metavar="CONTROLNET",
        help=f"a ControlNet's folder, a hub id, or {EMBEDDED} ({EMBEDDED}, for the {EMBEDDED} model)",
    )
    follow.add_argument(
        "--control-scale", type=number, metavar="X", help=f"how much the drawing counts; 0: not ({DEFAULT_SCALE})"
    )
    follow.add_argument(
        "--control-preview", type=Path, metavar="FILE.png", help="a file for what the ControlNet is shown"
    )

    how = parser.add_argument_group("how to draw it")
    how.add_argument("--model", metavar="MODEL", help=f"a pipeline folder, a hub id, or {EMBEDDED} ({EMBEDDED})")
    how.add_argument(
        "--steps",
        type=whole_number(1),
        metavar="N",
        help=f"steps of the network ({SPRINT_STEPS}, and {FLOW_STEPS} for a model with a flow-matching scheduler)",
    )
    how.add_argument("--timesteps", type=angles, metavar="T,T,..", help="the angles themselves, in radians, down to 0")
    how.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="width and height in pixels (those of the model, and with --mask those of the init image)",
    )
    how.add_argument("--guidance", type=number, metavar="X", help=f"guidance scale ({_DEFAULT_GUIDANCE})")
    how.add_argument("--dtype", choices=DTYPES, help="number format (auto: bfloat16 on CUDA, else float32)")
    how.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps, .. (auto: the fastest of this machine)")

    how.add_argument(
        "--memory", type=amount, metavar="SIZE", help="load the model so that it fits a device of so much, such as 8GiB"
    )
    how.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="bits of the weights (the model's; with --memory, as many as fit)"
    )

    where = parser.add_argument_group("where to put it")
    where.add_argument("--output", type=Path, metavar="PATH", help="a folder, or a file ending in .png (this folder)")
    where.add_argument("--grid", action="store_true", help="one sheet with captions instead of single pictures")
    where.add_argument("--json", action="store_true", help="print what was drawn as one JSON document, nothing else")
    parser.set_defaults(run=run)


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of the file, one a line, without its empty lines."""
    prompts = list(given)
    if file is not None:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not text in UTF-8") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{'standard input' if file == '-' else file} holds no prompt")
        prompts += lines
    return prompts


def choose_pictures(options: argparse.Namespace, like: Record | None) -> tuple[Picture, ...]:
    """What to draw: each prompt with seeds that count up from the first, or just what `like` shows.

    A picture's seed depends on nothing but its own prompt's count, so it is the same alone and among others.
    """
    prompts = read_prompts(options.prompts, options.prompts_file)
    seed = options.seed
    if like is not None:
        if not prompts and seed is None and options.num_images is None:
            return like.pictures
        prompts = prompts or list(dict.fromkeys(picture.prompt for picture in like.pictures))
        seed = like.pictures[0].seed if seed is None else seed
    if not prompts:
        raise ValueError('nothing to draw: give a prompt, such as "a red circle left of a blue square"')
    seed, count = seed or 0, options.num_images or 1
    if seed + count - 1 > LARGEST_SEED:
        raise ValueError(f"--seed {seed} with --num-images {count} goes beyond the largest seed, {LARGEST_SEED}")
    return tuple(Picture(prompt=prompt, seed=seed + index) for prompt in prompts for index in range(count))


def choose_request(options: argparse.Namespace, like: Settings | None) -> Request:
    """The settings given, completed by those that `like` stored; reads the pictures to start from and to follow.

    Raises ValueError or OSError for options that do not fit, or files that are no such pictures, and ImportError for a
    control whose package is not installed.
    """
    if options.steps is not None and options.timesteps is not None:
        raise ValueError("--steps and --timesteps exclude each other: the angles say how many steps there are")
    request = Request(
        model=like.model if like else EMBEDDED,
        steps=like.steps if like else None,
        timesteps=like.timesteps if like else None,
        size=(like.width, like.height) if like else None,
        guidance=like.guidance if like else _DEFAULT_GUIDANCE,
        dtype=like.dtype if like else "auto",
        device=like.device if like else "auto",
        quantization=like.quantization if like else None,
        memory=like.memory if like else None,
        start=choose_start(options.init_image, options.mask, options.strength, like),
        guide=None,
    )
    if options.steps is not None or options.timesteps is not None:
        request = replace(request, steps=options.steps, timesteps=options.timesteps)
    names = ("model", "size", "guidance", "dtype", "device", "quantization", "memory")
    request = replace(request, **{name: getattr(options, name) for name in names if getattr(options, name) is not None})
    if request.size is None and request.start is not None and request.start.mask is not None:
        # As the pipeline would, but known before it is loaded to fit this size.
        request = replace(request, size=request.start.image.image.size)
    guide = choose_guide(
        options.control_image, options.control, options.controlnet, options.control_scale, request.model, like
    )
    if guide is not None and request.start is not None and request.start.mask is not None:
        raise ValueError("--control-image and --mask exclude each other: there is no inpainting after a drawing")
    return replace(request, guide=guide)


def choose_preview(file: Path | None, request: Request) -> Path | None:
    """Where to put what the ControlNet is shown; makes its folder. Raises ValueError or OSError if that cannot be."""
    if file is None:
        return None
    if request.guide is None:
        raise ValueError("--control-preview needs --control-image: without one, there is nothing to show")
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ValueError(f"--control-preview must be a file ending in .png, got {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def choose_job(options: argparse.Namespace) -> Job:
    """The whole job; makes the folders for its pictures.

    Raises ValueError or OSError for options that do not fit, and ImportError as `choose_request`.
    """
    record = read_record(options.like) if options.like is not None else None
    pictures = choose_pictures(options, record)
    request = choose_request(options, record.settings if record else None)
    preview = choose_preview(options.control_preview, request)
    folder, file_name = prepare_output(options.output)
    return Job(
        pictures=pictures,
        request=request,
        folder=folder,
        file_name=file_name,
        is_sheet=options.grid or (record is not None and record.is_sheet),
        preview=preview,
        like=(options.like, record) if record else None,
    )


def as_document(drawn: Sequence[Drawn]) -> dict[str, object]:
    """What `--json` prints: the settings that all pictures share, and each picture with its file and seconds."""
    pictures = [
        {"file": str(one.file), **asdict(one.picture), "seconds": round(one.seconds, 3)}  # seconds of drawing alone
        for one in drawn
    ]
    document = {**asdict(drawn[0].settings), "pictures": pictures}
    return document if drawn[0].preview is None else {**document, "control_preview": str(drawn[0].preview)}


def run(options: argparse.Namespace) -> None:
    """Draws what the options ask for and prints where it lies, each file as soon as it is there."""
    from tqdm import tqdm

    drawn: list[Drawn] = []
    written: list[Path | None] = [None]
    with screen.quiet_libraries():
        job = choose_job(options)
        for one in draw(job):
            new = [file for file in (one.preview, one.file) if file not in written]
            for file in [] if options.json else new:
                tqdm.write(f"wrote {file}")  # between the progress bars, if there are any
            written += new
            drawn.append(one)
    if options.json:
        print(json.dumps(as_document(drawn), indent=2))
