"""Pictures: as they are looked at, whatever kind of file they are, and cut to a size around the middle."""

import io

import numpy as np
import pytest
from PIL import Image

from sana_sprint.pictures import decode_picture
from sana_sprint.training.datasets.pictures import fit_picture, picture_size
from sana_sprint.training.datasets.records import Span


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def turned(degrees_tag):
    exif = Image.Exif()
    exif[0x0112] = degrees_tag
    return exif


KINDS = {
    "png": encoded(Image.new("RGB", (40, 30))),
    "grey": encoded(Image.new("L", (40, 30))),
    "palette": encoded(Image.new("P", (40, 30))),
    "bilevel": encoded(Image.new("1", (40, 30))),
    "transparent": encoded(Image.new("RGBA", (40, 30))),
    "cmyk": encoded(Image.new("CMYK", (40, 30)), "JPEG"),
    "jpeg": encoded(Image.new("RGB", (40, 30)), "JPEG"),
    "webp": encoded(Image.new("RGB", (40, 30)), "WEBP"),
    "jpeg on its side": encoded(Image.new("RGB", (30, 40)), "JPEG", exif=turned(6)),
    "webp on its side": encoded(Image.new("RGB", (30, 40)), "WEBP", exif=turned(8)),
    "jpeg on its head": encoded(Image.new("RGB", (40, 30)), "JPEG", exif=turned(3)),
    "png that says it is on its side": encoded(Image.new("RGB", (40, 30)), exif=turned(6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_in_the_header_is_that_of_the_decoded_picture_also_within_a_file(kind, tmp_path):
    content = KINDS[kind]
    (tmp_path / "shard").write_bytes(b"before" + content + b"after" * 100)
    decoded = decode_picture(content)
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))
    assert picture_size(Span(tmp_path / "shard", 6, len(content))) == (30, 40)


def test_a_picture_on_its_side_is_put_upright():
    top_is_red = Image.new("RGB", (32, 32), "blue")
    top_is_red.paste("red", (0, 0, 32, 16))
    # Orientation 6: to be turned clockwise by a quarter for looking at.
    content = encoded(top_is_red.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned(6), quality=100)
    red, _, blue = decode_picture(content).getpixel((16, 4))
    assert (red > 200, blue < 60) == (True, True)


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    decoded = decode_picture(encoded(image))
    assert (decoded.getpixel((1, 1)), decoded.getpixel((6, 6))) == ((0, 0, 255), (255, 255, 255))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_more_than_8_bits_are_refused_for_they_would_come_out_white(dtype):
    content = encoded(Image.fromarray(np.full((8, 8), 40000, dtype)), "TIFF")
    with pytest.raises(ValueError, match="8 bits per channel"):
        decode_picture(content)


def test_a_picture_is_cropped_around_its_middle():
    stripes = np.zeros((16, 64, 3), np.uint8)
    stripes[:, 16:48] = 255
    assert (fit_picture(Image.fromarray(stripes), 16, 32) == 255).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64), (64, 16)])
def test_a_picture_is_enlarged_to_cover_the_size(height, width):
    fitted = fit_picture(Image.new("RGB", (10, 7), (1, 2, 3)), height, width)
    assert fitted.shape == (height, width, 3)
    assert fitted.dtype == np.uint8
    assert (fitted == (1, 2, 3)).all()


def test_a_picture_of_the_right_size_is_not_touched():
    dots = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    assert np.array_equal(fit_picture(Image.fromarray(dots), 24, 40), dots)
