"""A model's name, a device and a number format, as a user gives them, to a pipeline ready to draw."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sana_sprint import (
        SanaSprintControlNetImg2ImgPipeline,
        SanaSprintControlNetPipeline,
        SanaSprintImg2ImgPipeline,
        SanaSprintInpaintPipeline,
        SanaSprintPipeline,
    )

    Pipeline = (
        SanaSprintPipeline
        | SanaSprintImg2ImgPipeline
        | SanaSprintInpaintPipeline
        | SanaSprintControlNetPipeline
        | SanaSprintControlNetImg2ImgPipeline
    )

EMBEDDED = "embedded"
DTYPES = ("auto", "float32", "bfloat16", "float16")

# A SANA-Sprint model draws in two steps; the flow model that it is distilled from needs about twenty.
SPRINT_STEPS, FLOW_STEPS = 2, 20

_SAMPLE_BYTES = 2**20
_COMPONENT_FILES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A folder of a pipeline or a network: the name it was asked for by, its place, what tells it from another."""

    name: str
    folder: Path
    fingerprint: str


@dataclass(frozen=True)
class Fitting:
    """How a model is made to fit: see `load_pipeline`. Without either it is loaded as it is."""

    quantization: str | None = None
    memory: int | None = None  # bytes
    size: tuple[int, int] | None = None  # width and height of the pictures, pixels


def find_model(name: str) -> Model:
    """The pipeline folder behind a name: `embedded`, a folder, or the id of a model on the hub, which is fetched.

    Raises ValueError if a folder holds no pipeline and OSError if there is no such folder or model.
    """

    def embedded() -> Path:
        from sana_sprint.assets import embedded_checkpoint

        return embedded_checkpoint()

    def fetch() -> str:
        from sana_sprint import SanaSprintPipeline

        return SanaSprintPipeline.download(name)

    folder = find_folder(name, "--model", "model", embedded, fetch)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} is no pipeline folder: it holds no model_index.json")
    return Model(name=name, folder=folder, fingerprint=fingerprint(folder))


def find_folder(
    name: str, option: str, kind: str, embedded: Callable[[], Path], fetch: Callable[[], str | Path]
) -> Path:
    """The folder behind the value of an option: `embedded`, a folder, or the id of what is on the hub.

    Args:
        name: the value.
        option, kind: the option and what it takes, for messages.
        embedded, fetch: give the folder of what is embedded, and of what the hub has by that id.

    Raises OSError if there is no such folder and the hub has nothing by that name.
    """
    if name == EMBEDDED:
        return embedded()
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    if not _is_hub_id(name):
        raise FileNotFoundError(f"no folder {name}; {option} takes a {kind}'s folder or a hub id such as owner/name")
    try:
        return Path(fetch())
    except OSError as error:
        raise OSError(f"there is no folder {name}, and the hub gave no such {kind}: {error}") from error


def _is_hub_id(name: str) -> bool:
    """Whether a name that is no path here can be a repository's on the hub: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def fingerprint(folder: Path) -> str:
    """The `digest` of a pipeline's files: model_index.json, and configs, weights and vocabularies of its components."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'model_index.json'} is not valid JSON: {error}") from None
    components = [folder / name for name in sorted(index) if (folder / name).is_dir()]
    files = [path for part in components for path in sorted(part.rglob("*")) if path.suffix in _COMPONENT_FILES]
    return digest([folder / "model_index.json", *files])


def digest(files: Sequence[Path]) -> str:
    """Sixteen hex digits that change with files: their names, sizes, and first and last mebibyte.

    Names count from the first file's folder on. Weights of gigabytes are not read whole; training changes every part of
    them.
    """
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.relative_to(files[0].parent).as_posix()} {size}\n".encode())
        with path.open("rb") as stream:
            found.update(stream.read(_SAMPLE_BYTES))
            if size > _SAMPLE_BYTES:
                stream.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES), os.SEEK_SET)
                found.update(stream.read())
    return found.hexdigest()[:16]


def choose_device(asked: str) -> "torch.device":
    """The device to draw on; `auto` is CUDA, else Apple's MPS, else the CPU.

    Raises ValueError if torch knows no such device or it is not there.
    """
    import torch

    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot draw on --device {asked}: {reason}") from None
    return device


def choose_dtype(asked: str, device: "torch.device") -> "torch.dtype":
    """The number format of weights and activations; `auto` is bfloat16 on CUDA, where it is fast, else float32."""
    import torch

    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, asked)


def load(
    model: Model,
    device: "torch.device",
    dtype: "torch.dtype",
    fitting: Fitting,
    show_progress: bool,
    kind: "type[Pipeline] | None" = None,
    controlnet: Model | None = None,
) -> "Pipeline":
    """The model on its device as a pipeline of a kind, None for text to image, its bars shown or not.

    Raises ValueError or OSError, as diffusers does, if the folders' files do not make one, and ValueError if it cannot
    be made to fit.
    """
    import diffusers
    import transformers

    from sana_sprint import SanaSprintPipeline

    kind = kind or SanaSprintPipeline
    set_bars = (
        diffusers.utils.logging.enable_progress_bar if show_progress else diffusers.utils.logging.disable_progress_bar
    )
    set_bars()
    transformers.utils.logging.disable_progress_bar()
    if fitting.quantization is None and fitting.memory is None:
        components = {}
        if controlnet is not None:
            from sana_sprint import SanaControlNetModel

            components["controlnet"] = SanaControlNetModel.from_pretrained(controlnet.folder, torch_dtype=dtype)
        pipe = kind.from_pretrained(model.folder, torch_dtype=dtype, **components).to(device)
    else:
        from sana_sprint import load_pipeline  # late, for it imports bitsandbytes, which takes seconds

        width, height = fitting.size or (None, None)
        pipe = load_pipeline(
            model.folder,
            quantization=fitting.quantization,
            memory=fitting.memory,
            device=device,
            dtype=dtype,
            width=width,
            height=height,
            pipeline_class=kind,
            controlnet=None if controlnet is None else controlnet.folder,
        )
    pipe.set_progress_bar_config(disable=not show_progress, leave=False)
    return pipe


def seen_size(model: Model, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Width and height, in pixels, of what is seen of a picture when it is drawn, before it gets the size asked for.

    Known before the model is loaded. None asks for the model's own size. Raises ValueError for one that it cannot draw.
    """
    from sana_sprint.memory.configs import read_configs
    from sana_sprint.pipelines.images import seen_part

    width, height = size or (None, None)
    part = seen_part(read_configs(model.folder).canvas(height, width))
    return part.width, part.height


def own_steps(pipe: "Pipeline") -> int:
    """The number of steps that suits a pipeline, by its scheduler."""
    return SPRINT_STEPS if type(pipe.scheduler).__name__ == "SCMScheduler" else FLOW_STEPS
