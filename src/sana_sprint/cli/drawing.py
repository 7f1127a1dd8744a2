"""A job (what to draw, how, and where to) to files, one picture after the other."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint import __version__
from sana_sprint.cli import collector, screen
from sana_sprint.cli.control import Guide, find_controlnet
from sana_sprint.cli.files import picture_name, save_new
from sana_sprint.cli.inputs import Start
from sana_sprint.cli.model import (
    EMBEDDED,
    Fitting,
    Model,
    choose_device,
    choose_dtype,
    find_model,
    load,
    own_steps,
    seen_size,
)
from sana_sprint.cli.records import InputFile, Picture, Record, Settings, to_chunk
from sana_sprint.cli.words import check_words

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana_sprint.cli.model import Pipeline

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
    guide: Guide | None  # None: no ControlNet

    def files(self) -> dict[str, InputFile | None]:
        """The pictures that the drawing is given, under the names that `Settings` has for them."""
        return {name: file for given in (self.start, self.guide) if given for name, file in given.files().items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the command: `like` is the picture to draw again, with the file it was read from."""

    pictures: tuple[Picture, ...]
    request: Request
    folder: Path
    file_name: str | None  # None: named for prompt and seed
    is_sheet: bool
    preview: Path | None  # where to put what the ControlNet is shown
    like: tuple[Path, Record] | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture that was drawn, and the file it is in."""

    picture: Picture
    settings: Settings
    file: Path
    seconds: float
    preview: Path | None  # the file with what the ControlNet was shown, if it was asked for


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """All that pictures are drawn with."""

    pipe: "Pipeline"
    request: Request  # with the model's own step count
    model: Model
    controlnet: Model | None
    shown: "Image | None"  # what the ControlNet is shown
    preview: Path | None


def difference(
    stored: Settings, model: Model, controlnet: Model | None, torch_version: str, files: Mapping[str, InputFile | None]
) -> str | None:
    """What a picture was drawn with that is another here, or None: a reason for other pixels."""
    pairs = {
        "model files": (stored.fingerprint, model.fingerprint),
        "sana-sprint": (stored.version, __version__),
        "torch": (stored.torch, torch_version),
    }
    if stored.controlnet_fingerprint is not None and controlnet is not None:
        pairs["ControlNet files"] = (stored.controlnet_fingerprint, controlnet.fingerprint)
    for setting, here in files.items():
        there: InputFile | None = getattr(stored, setting)
        # Another path is another picture, as another prompt is: asked for.
        if there is not None and here is not None and there.path == here.path:
            pairs[f"{here.path} of SHA-256"] = (there.sha256[:_SHOWN_DIGITS], here.sha256[:_SHOWN_DIGITS])
    differing = [f"{name} {before} (here {now})" for name, (before, now) in pairs.items() if before != now]
    return ", ".join(differing) or None


def _kind_of(request: Request) -> "type[Pipeline]":
    """The pipeline that can start and be guided so. Imports nearly everything that drawing needs."""
    from sana_sprint import (
        SanaSprintControlNetImg2ImgPipeline,
        SanaSprintControlNetPipeline,
        SanaSprintImg2ImgPipeline,
        SanaSprintInpaintPipeline,
        SanaSprintPipeline,
    )

    if request.guide is not None:
        return SanaSprintControlNetPipeline if request.start is None else SanaSprintControlNetImg2ImgPipeline
    if request.start is None:
        return SanaSprintPipeline
    return SanaSprintImg2ImgPipeline if request.start.mask is None else SanaSprintInpaintPipeline


def _draw_one(ready: _Ready, picture: Picture) -> "Image":
    """One picture, alone in its batch and with its own generator, so that it can be drawn again alone."""
    import torch

    request = ready.request
    width, height = request.size or (None, None)
    given: dict[str, Any] = {"num_inference_steps": request.steps}
    if request.timesteps is not None:
        given = {"timesteps": list(request.timesteps)}
    if request.start is not None:
        given |= request.start.arguments()
    if request.guide is not None:
        given |= {"control_image": ready.shown, "controlnet_conditioning_scale": request.guide.scale}
    images, *_ = ready.pipe(
        prompt=picture.prompt,
        **given,
        guidance_scale=request.guidance,
        width=width,
        height=height,
        # On the CPU, so that a seed means the same noise on every device.
        generator=torch.Generator("cpu").manual_seed(picture.seed),
        output_type="pil",
        return_dict=False,
    )
    return images[0]


def _prepare(job: Job) -> _Ready:
    """All that the job's pictures are drawn with; what can be refused is refused before a network is loaded."""
    request = job.request
    controlnet = None if request.guide is None else find_controlnet(request.guide.controlnet)
    model = find_model(request.model)
    if model.name == EMBEDDED:
        prompts = [picture.prompt for picture in job.pictures]
        check_words(prompts, follows_drawing=job.request.guide is not None)
    with collector.long_lived():
        import torch
        from PIL.PngImagePlugin import PngInfo

        device = choose_device(request.device)
        kind = _kind_of(request)
    dtype = choose_dtype(request.dtype, device)
    if job.like is not None:
        path, record = job.like
        differing = difference(record.settings, model, controlnet, str(torch.__version__), request.files())
        if differing:
            screen.report("warning", f"{path} was drawn with {differing}: the picture may differ")
        torch.set_num_threads(record.settings.threads)
    shown, drawn_size = None, seen_size(model, request.size)
    if request.guide is not None:
        shown = request.guide.drawing(drawn_size, device)
    fitting = Fitting(request.quantization, request.memory, request.size)
    pipe = load(model, device, dtype, fitting, screen.is_terminal(), kind, controlnet)
    preview = None if shown is None or job.preview is None else save_new(shown, job.preview, PngInfo())
    request = replace(request, device=str(device), dtype=str(dtype).removeprefix("torch."))
    if request.steps is None and request.timesteps is None:
        request = replace(request, steps=own_steps(pipe))
    return _Ready(pipe=pipe, request=request, model=model, controlnet=controlnet, shown=shown, preview=preview)


def _settings(ready: _Ready, image: "Image") -> Settings:
    import torch

    request, model, controlnet = ready.request, ready.model, ready.controlnet
    given: dict[str, Any] = dict(request.files())
    if request.start is not None:
        given["strength"] = request.start.strength
    if request.guide is not None:
        given |= request.guide.settings()
    if controlnet is not None:
        given["controlnet_fingerprint"] = controlnet.fingerprint
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
        **given,
    )


def draw(job: Job) -> Iterator[Drawn]:
    """Draws the job's pictures and yields each when its file is written; a sheet's all come at its end.

    Raises ValueError or OSError, with a message for the user, for whatever stands in the way.
    """
    from tqdm import tqdm

    ready = _prepare(job)
    sheet: list[tuple[Image, float]] = []
    is_hidden = len(job.pictures) == 1 or not screen.is_terminal()
    for picture in tqdm(job.pictures, desc="pictures", unit="picture", disable=is_hidden, leave=False):
        start = time.perf_counter()
        image = _draw_one(ready, picture)
        seconds = time.perf_counter() - start
        if job.is_sheet:
            sheet.append((image, seconds))
            continue
        settings = _settings(ready, image)
        record = Record(settings=settings, pictures=(picture,), is_sheet=False)
        path = job.folder / (job.file_name or picture_name(picture.prompt, picture.seed))
        file = save_new(image, path, to_chunk(record))
        yield Drawn(picture=picture, settings=settings, file=file, seconds=seconds, preview=ready.preview)
    if job.is_sheet:
        yield from _finish_sheet(job, sheet, ready)


def _finish_sheet(job: Job, sheet: list[tuple["Image", float]], ready: _Ready) -> Iterator[Drawn]:
    from sana_sprint.cli.sheet import draw_sheet

    settings = _settings(ready, sheet[0][0])
    image = draw_sheet([image for image, _ in sheet], [picture.prompt for picture in job.pictures])
    record = Record(settings=settings, pictures=job.pictures, is_sheet=True)
    first = job.pictures[0]
    path = job.folder / (job.file_name or f"sheet-{picture_name(first.prompt, first.seed)}")
    file = save_new(image, path, to_chunk(record))
    for picture, (_, seconds) in zip(job.pictures, sheet, strict=True):
        yield Drawn(picture=picture, settings=settings, file=file, seconds=seconds, preview=ready.preview)
