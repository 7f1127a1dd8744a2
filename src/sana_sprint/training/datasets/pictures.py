"""Bytes of a picture to its size, and to an array of the size that its batch has."""

from io import BytesIO
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ContainerIO import ContainerIO

from sana_sprint.training.datasets.records import Span

_TURNED_SIDEWAYS = 5  # and every orientation above it
_WIDE_MODES = ("I", "F")


def _open(stream: IO[bytes]) -> Image.Image:
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        raise ValueError("is no picture of a known format") from None  # PIL's message is another one each time


def _is_upright(image: Image.Image) -> bool:
    # A PNG may say so at its very end, and would be decoded for that; cameras write none.
    return image.format == "PNG" or image.getexif().get(ExifTags.Base.Orientation, 1) < _TURNED_SIDEWAYS


def picture_size(span: Span) -> tuple[int, int]:
    """Height and width as the picture is looked at, from its header alone.

    Raises:
        ValueError: if that is no picture, and other errors for some kinds of damage.
    """
    with span.path.open("rb") as stream, _open(ContainerIO(stream, span.offset, span.size)) as image:
        width, height = image.size
        return (height, width) if _is_upright(image) else (width, height)


def decode_picture(content: bytes) -> Image.Image:
    """A picture in RGB, upright, and on white where it is transparent.

    Raises:
        ValueError: if that is no picture, or one of more than 8 bits per channel.
        OSError: for one that is damaged, and other errors for some kinds of damage.
    """
    with _open(BytesIO(content)) as image:
        if image.mode.startswith(_WIDE_MODES):
            raise ValueError(f"pictures must have 8 bits per channel, got mode {image.mode}")
        upright = image if image.format == "PNG" else ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            coloured = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
        return upright.convert("RGB")


def fit_picture(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The picture (height, width, 3) uint8: resized to cover that size, bicubic, and cropped around the middle."""
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
