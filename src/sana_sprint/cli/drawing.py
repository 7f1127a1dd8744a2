"""A job (what to draw, how, and where to) to files, one picture after the other."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint import __version__
from sana_sprint.cli import screen
from sana_sprint.cli.files import picture_name, save_new
from sana_sprint.cli.inputs import Start
from sana_sprint.cli.model import EMBEDDED, Fitting, Model, choose_device, choose_dtype, find_model, load, own_steps
from sana_sprint.cli.records import InputFile, Picture, Record, Settings, to_chunk
from sana_sprint.cli.words import check_words

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana_sprint import SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline, SanaSprintPipeline

    Pipeline = SanaSprintPipeline | SanaSprintImg2ImgPipeline | SanaSprintInpaintPipeline


_SHOWN_DIGITS = 16  # of a SHA-256, as many as a model's fingerprint has


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings asked for, before a model is loaded: None stands for the model's own."""

    model: str
    steps: int | None
    timesteps: tuple[float, ...] | None
    size: tuple[int, int] | None  # width and height, pixels
    guidance: float
    dtype: str
    device: str
    quantization: str | None
    memory: int | None  # bytes
    start: Start | None  # None: noise alone


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the command: `like` is the picture to draw again, with the file it was read from."""

    pictures: tuple[Picture, ...]
    request: Request
    folder: Path
    file_name: str | None  # None: named for prompt and seed
    is_sheet: bool
    like: tuple[Path, Record] | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture that was drawn, and the file it is in."""

    picture: Picture
    settings: Settings
    file: Path
    seconds: float


def difference(stored: Settings, model: Model, torch_version: str, start: Start | None) -> str | None:
    """What a picture was drawn with that is another here, or None: a reason for other pixels."""
    pairs = {
        "model files": (stored.fingerprint, model.fingerprint),
        "sana-sprint": (stored.version, __version__),
        "torch": (stored.torch, torch_version),
    }
    for setting, here in ({} if start is None else start.files()).items():
        there: InputFile | None = getattr(stored, setting)
        # Another path is another picture, as another prompt is: asked for.
        if there is not None and here is not None and there.path == here.path:
            pairs[f"{here.path} of SHA-256"] = (there.sha256[:_SHOWN_DIGITS], here.sha256[:_SHOWN_DIGITS])
    differing = [f"{name} {before} (here {now})" for name, (before, now) in pairs.items() if before != now]
    return ", ".join(differing) or None


def _starting_from(start: Start | None, pipe: "SanaSprintPipeline") -> "Pipeline":
    """The pipeline that can start so, around the same networks."""
    if start is None:
        return pipe
    from sana_sprint import SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline

    kind = SanaSprintImg2ImgPipeline if start.mask is None else SanaSprintInpaintPipeline
    started = kind.from_pipe(pipe)
    started.set_progress_bar_config(disable=not screen.is_terminal(), leave=False)
    return started


def _draw_one(pipe: "Pipeline", picture: Picture, request: Request) -> "Image":
    """One picture, alone in its batch and with its own generator, so that it can be drawn again alone."""
    import torch

    width, height = request.size or (None, None)
    timetable: dict[str, Any] = {"num_inference_steps": request.steps}
    if request.timesteps is not None:
        timetable = {"timesteps": list(request.timesteps)}
    start = {} if request.start is None else request.start.arguments()
    images, *_ = pipe(
        prompt=picture.prompt,
        **timetable,
        **start,
        guidance_scale=request.guidance,
        width=width,
        height=height,
        # On the CPU, so that a seed means the same noise on every device.
        generator=torch.Generator("cpu").manual_seed(picture.seed),
        output_type="pil",
        return_dict=False,
    )
    return images[0]


def _prepare(job: Job) -> tuple["Pipeline", Request, Model]:
    """The pipeline, the request with the model's own step count, and the model."""
    import torch

    model = find_model(job.request.model)
    if model.name == EMBEDDED:
        check_words([picture.prompt for picture in job.pictures])
    device = choose_device(job.request.device)
    dtype = choose_dtype(job.request.dtype, device)
    if job.like is not None:
        path, record = job.like
        differing = difference(record.settings, model, str(torch.__version__), job.request.start)
        if differing:
            screen.report("warning", f"{path} was drawn with {differing}: the picture may differ")
        torch.set_num_threads(record.settings.threads)
    fitting = Fitting(job.request.quantization, job.request.memory, job.request.size)
    pipe = load(model, device, dtype, fitting, show_progress=screen.is_terminal())
    request = replace(job.request, device=str(device), dtype=str(dtype).removeprefix("torch."))
    if request.steps is None and request.timesteps is None:
        request = replace(request, steps=own_steps(pipe))
    return _starting_from(request.start, pipe), request, model


def _settings(request: Request, model: Model, image: "Image") -> Settings:
    import torch

    start = request.start
    return Settings(
        model=model.name,
        fingerprint=model.fingerprint,
        steps=request.steps,
        timesteps=request.timesteps,
        guidance=request.guidance,
        width=image.width,
        height=image.height,
        dtype=request.dtype,
        device=request.device,
        threads=torch.get_num_threads(),
        version=__version__,
        torch=str(torch.__version__),
        quantization=request.quantization,
        memory=request.memory,
        strength=None if start is None else start.strength,
        **({} if start is None else start.files()),
    )


def draw(job: Job) -> Iterator[Drawn]:
    """Draws the job's pictures and yields each when its file is written; a sheet's all come at its end.

    Raises ValueError or OSError, with a message for the user, for whatever stands in the way.
    """
    from tqdm import tqdm

    pipe, request, model = _prepare(job)
    sheet: list[tuple[Image, float]] = []
    is_hidden = len(job.pictures) == 1 or not screen.is_terminal()
    for picture in tqdm(job.pictures, desc="pictures", unit="picture", disable=is_hidden, leave=False):
        start = time.perf_counter()
        image = _draw_one(pipe, picture, request)
        seconds = time.perf_counter() - start
        if job.is_sheet:
            sheet.append((image, seconds))
            continue
        settings = _settings(request, model, image)
        record = Record(settings=settings, pictures=(picture,), is_sheet=False)
        path = job.folder / (job.file_name or picture_name(picture.prompt, picture.seed))
        file = save_new(image, path, to_chunk(record))
        yield Drawn(picture=picture, settings=settings, file=file, seconds=seconds)
    if job.is_sheet:
        yield from _finish_sheet(job, sheet, _settings(request, model, sheet[0][0]))


def _finish_sheet(job: Job, sheet: list[tuple["Image", float]], settings: Settings) -> Iterator[Drawn]:
    from sana_sprint.cli.sheet import draw_sheet

    image = draw_sheet([image for image, _ in sheet], [picture.prompt for picture in job.pictures])
    record = Record(settings=settings, pictures=job.pictures, is_sheet=True)
    first = job.pictures[0]
    path = job.folder / (job.file_name or f"sheet-{picture_name(first.prompt, first.seed)}")
    file = save_new(image, path, to_chunk(record))
    for picture, (_, seconds) in zip(job.pictures, sheet, strict=True):
        yield Drawn(picture=picture, settings=settings, file=file, seconds=seconds)
