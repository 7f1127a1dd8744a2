"""Bytes of a picture file to pixels as they are looked at: upright, and opaque."""

from io import BytesIO
from typing import IO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

_TURNED_SIDEWAYS = 5  # and every orientation above it
_WIDE_MODES = ("I", "F")


def open_picture(stream: IO[bytes]) -> Image.Image:
    """The picture in a stream, of which the header is read.

    Raises:
        ValueError: if that is no picture.
    """
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        raise ValueError("is no picture of a known format") from None  # PIL's message is another one each time


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as the picture is looked at, from its header alone."""
    # A PNG may say how it is turned at its very end, and would be decoded for that; cameras write none.
    is_turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= _TURNED_SIDEWAYS
    width, height = image.size
    return (height, width) if is_turned else (width, height)


def decode_picture(content: bytes) -> Image.Image:
    """A picture in RGB, upright, and on white where it is transparent.

    Raises:
        ValueError: if that is no picture, or one of more than 8 bits per channel.
        OSError: for one that is damaged, and other errors for some kinds of damage.
    """
    with open_picture(BytesIO(content)) as image:
        if image.mode.startswith(_WIDE_MODES):
            raise ValueError(f"pictures must have 8 bits per channel, got mode {image.mode}")
        upright = image if image.format == "PNG" else ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            coloured = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
        return upright.convert("RGB")
