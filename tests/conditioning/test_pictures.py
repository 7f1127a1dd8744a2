"""Pictures in every form that callers have, to RGB."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint.conditioning.pictures import opencv, read_picture, white_on_black

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREYS = COLOURS[:, :, 0]
AS_GREY = np.repeat(GREYS[:, :, None], 3, axis=2)
TENSOR = torch.from_numpy(COLOURS).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("picture", "wanted"),
    [
        (Image.fromarray(COLOURS), COLOURS),
        (Image.fromarray(COLOURS).convert("RGBA"), COLOURS),
        (Image.fromarray(GREYS), AS_GREY),
        (COLOURS, COLOURS),
        (COLOURS.astype(np.int64), COLOURS),
        (COLOURS / 255, COLOURS),
        (GREYS, AS_GREY),
        (GREYS[:, :, None], AS_GREY),
        (GREYS > 99, 255 * (AS_GREY > 99)),
        (TENSOR, COLOURS),
        (TENSOR[None], COLOURS),
        (TENSOR / 255, COLOURS),
        (TENSOR.double().div(255).requires_grad_(), COLOURS),
        (TENSOR[:1], AS_GREY),
        (TENSOR[0], AS_GREY),
        ((TENSOR > 99).bfloat16(), 255 * (COLOURS > 99)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_picture_in_any_form_is_the_same_in_rgb(picture, wanted):
    read = read_picture(picture)
    assert (read.mode, read.size) == ("RGB", (7, 5))
    assert np.array_equal(np.asarray(read), wanted)


def test_a_palette_and_two_levels_are_read_by_their_colours():
    palette = Image.fromarray(COLOURS).quantize(256)
    assert np.array_equal(np.asarray(read_picture(palette)), np.asarray(palette.convert("RGB")))
    assert np.array_equal(np.asarray(read_picture(Image.fromarray(GREYS > 99))), 255 * (AS_GREY > 99))


def with_alpha() -> Image.Image:
    picture = Image.fromarray(COLOURS).convert("RGBA")
    picture.putpixel((3, 2), (1, 2, 3, 254))
    return picture


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (with_alpha(), "transparent in places: paste it on a ground"),
        (with_alpha().convert("LA"), "transparent in places"),
        (Image.new("I;16", (3, 2)), "8 bits per channel, got one of the mode I;16"),
        (Image.new("F", (3, 2)), "8 bits per channel, got one of the mode F"),
        (np.zeros((2, 3, 4)), r"one channel or three, .* got the shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, 8, 8), r"one channel or three, .* got the shape \(2, 3, 8, 8\)"),
        (torch.zeros(8), "one channel or three"),
        (np.zeros((0, 3)), "one channel or three"),
        (np.full((2, 3), np.nan), "must have them from 0 to 1"),
        (np.full((2, 3), 1.01), "must have them from 0 to 1"),
        (torch.full((3, 2, 3), -0.5), "must have them from 0 to 1"),
        (np.full((2, 3), 256), "must have them from 0 to 255"),
        (np.full((2, 3), -1), "must have them from 0 to 255"),
        ("picture.png", "must be of PIL, an array or a tensor, got str"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        read_picture(picture)


def test_strengths_and_masks_become_grey_pictures():
    grey = white_on_black(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert (grey.mode, grey.size) == ("RGB", (3, 1))
    assert np.asarray(grey)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert np.asarray(white_on_black(np.array([[False, True]])))[0].tolist() == [[0] * 3, [255] * 3]


def test_without_opencv_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # what import then takes for missing
    with pytest.raises(ImportError, match=r"needs OpenCV: pip install 'sana-sprint\[control\]'"):
        opencv()
