"""Picture files that a drawing is given, to what the pipelines take and what a record tells them by."""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli.records import InputFile, Settings

if TYPE_CHECKING:
    from PIL.Image import Image

# Those of the pipelines, without a mask and with one.
DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH = 0.6, 0.8


@dataclass(frozen=True, kw_only=True)
class Input:
    """A picture file that was read."""

    file: InputFile
    image: "Image"


@dataclass(frozen=True, kw_only=True)
class Start:
    """The picture that a drawing starts from."""

    image: Input
    mask: Input | None
    strength: float

    def arguments(self) -> dict[str, Any]:
        """Those of the pipeline that can start so."""
        masked = {} if self.mask is None else {"mask_image": self.mask.image}
        return {"image": self.image.image, "strength": self.strength, **masked}

    def files(self) -> dict[str, InputFile | None]:
        """The files under the names that `Settings` has for them."""
        return {"init_image": self.image.file, "mask": None if self.mask is None else self.mask.file}


def read_input(path: Path) -> Input:
    """The picture in a file, upright where a camera has noted which way it was held.

    Raises OSError if the file cannot be read and ValueError if it holds no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = path.read_bytes()
    try:
        with Image.open(BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture") from None
    except Exception as error:  # each of Pillow's formats has its own kinds for damaged files
        raise ValueError(f"{path} is no whole picture: {error}") from None
    return Input(file=InputFile(path=str(path), sha256=hashlib.sha256(data).hexdigest()), image=upright)


def choose_input(option: str, given: Path | None, stored: InputFile | None) -> Input | None:
    """The picture in the file given, else in the one stored; None without either.

    Raises OSError and ValueError as `read_input`; where a stored file is gone, the error names the option.
    """
    if given is not None:
        return read_input(given)
    if stored is None:
        return None
    try:
        return read_input(Path(stored.path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{stored.path} is not there any more: {option} says where it is now") from None


def choose_start(
    init_image: Path | None, mask: Path | None, strength: float | None, like: Settings | None
) -> Start | None:
    """What to start from, the files and strength given completed by those that `like` stored; None for noise alone.

    Raises OSError if a file cannot be read, and ValueError if it holds no picture that the pipelines take, or if the
    three do not fit together.
    """
    image = choose_input("--init-image", init_image, like.init_image if like else None)
    if image is None:
        for option, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                raise ValueError(f"{option} needs --init-image: without one, pictures are drawn from noise alone")
        return None
    masked = choose_input("--mask", mask, like.mask if like else None)
    _check(image, masked)
    if strength is None and like is not None:
        strength = like.strength
    if strength is None:
        strength = DEFAULT_STRENGTH if masked is None else DEFAULT_MASKED_STRENGTH
    return Start(image=image, mask=masked, strength=strength)


def _check(image: Input, mask: Input | None) -> None:
    """Ask the pipelines' own readers, before a model is loaded."""
    from sana_sprint.pipelines.pictures import read_masks, read_pictures

    _name_errors(image, read_pictures)
    if mask is None:
        return
    _name_errors(mask, read_masks)
    if mask.image.size != image.image.size:
        (width, height), (found_width, found_height) = image.image.size, mask.image.size
        raise ValueError(
            f"{mask.file.path} must have the size of {image.file.path}, {width}x{height},"
            f" got {found_width}x{found_height}"
        )


def _name_errors(given: Input, read: Any) -> None:
    try:
        read(given.image)
    except ValueError as error:
        raise ValueError(f"{given.file.path}: {error}") from None
