"""What made a picture, to the text chunk of its PNG and back: everything needed to draw it again."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

CHUNK = "sana_sprint"

_FILES = ("init_image", "mask", "control_image")  # the settings that are an InputFile, or None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a run: its prompt and the seed of its own generator."""

    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A picture file that a drawing was given, and what tells it from another of its name."""

    path: str  # as the user gave it
    sha256: str  # of the file's bytes, in hex digits


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything beside prompt and seed that decides a picture's pixels, or tells why they may differ."""

    model: str  # "embedded", or the folder or hub id as the user gave it
    fingerprint: str
    steps: int | None  # None where timesteps say it
    timesteps: tuple[float, ...] | None
    guidance: float
    width: int  # pixels
    height: int
    dtype: str
    device: str
    threads: int  # sums on the CPU depend on how many threads share them
    version: str
    torch: str
    quantization: str | None = None  # None and no memory: loaded as it is
    memory: int | None = None  # bytes that the loading was planned for
    init_image: InputFile | None = None  # None: drawn from noise alone
    mask: InputFile | None = None
    strength: float | None = None  # None without init_image
    control_image: InputFile | None = None  # None: drawn without a ControlNet, and so are the next four
    control: str | None = None  # what was found in that picture
    controlnet: str | None = None  # "embedded", or the folder or hub id as the user gave it
    controlnet_fingerprint: str | None = None
    control_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """The settings of a PNG and what it shows: one picture, or a sheet of several."""

    settings: Settings
    pictures: tuple[Picture, ...]
    is_sheet: bool


def to_chunk(record: Record) -> "PngInfo":
    """The record as a PNG text chunk, JSON in plain ASCII."""
    from PIL.PngImagePlugin import PngInfo

    pictures = [asdict(picture) for picture in record.pictures]
    shown: dict[str, Any] = {"pictures": pictures} if record.is_sheet else pictures[0]
    text = PngInfo()
    text.add_text(CHUNK, json.dumps({**shown, **asdict(record.settings)}))
    return text


def read_record(path: Path) -> Record:
    """The record stored in a PNG that this command wrote.

    Raises OSError if the file cannot be read and ValueError if it is no such PNG.
    """
    from PIL import Image, UnidentifiedImageError

    data = path.read_bytes()
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()  # a text chunk may follow the pixels
            chunk = image.info.get(CHUNK)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture") from None
    except Exception as error:  # each kind of damage has its own
        raise ValueError(f"{path} is no whole picture: {error}") from None
    if chunk is None:
        raise ValueError(f"{path} holds no {CHUNK} text chunk: it was not drawn by sana-sprint generate")
    try:
        return _parse(json.loads(chunk))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the {CHUNK} text chunk of {path} cannot be understood ({error!r})") from None


def _parse(values: dict[str, Any]) -> Record:
    # A field with a default is younger than the first pictures, which were drawn with that default.
    defaults = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
    settings = {field.name: values[field.name] for field in fields(Settings) if field.name not in defaults}
    settings |= {name: values.get(name, default) for name, default in defaults.items()}
    if settings["timesteps"] is not None:
        settings["timesteps"] = tuple(float(angle) for angle in settings["timesteps"])
    settings |= {name: InputFile(**settings[name]) for name in _FILES if settings[name] is not None}
    is_sheet = "pictures" in values
    shown = values["pictures"] if is_sheet else [values]
    pictures = tuple(Picture(prompt=str(picture["prompt"]), seed=int(picture["seed"])) for picture in shown)
    if not pictures:
        raise ValueError("a sheet without pictures")
    return Record(settings=Settings(**settings), pictures=pictures, is_sheet=is_sheet)
