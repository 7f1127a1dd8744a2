"""Pictures in every form that callers have them in, and where they lie in the size that is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sana_sprint.pipelines.images import Canvas, fit_to_canvas
from sana_sprint.pipelines.pictures import on_canvas, read_pictures, read_source, resized, size_of

LEVELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
RGB = torch.from_numpy(LEVELS).permute(2, 0, 1).float() / 255


def pixels_of(picture) -> torch.Tensor:
    return resized(picture, *size_of(picture))


# C10
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(Image.fromarray(LEVELS), id="PIL"),
        pytest.param(LEVELS, id="uint8 array"),
        pytest.param(LEVELS[::-1][::-1], id="view"),
        pytest.param(LEVELS.astype(np.float32) / 255, id="float array"),
        pytest.param(torch.from_numpy(LEVELS).permute(2, 0, 1), id="uint8 tensor"),
        pytest.param(RGB, id="float tensor"),
        pytest.param(RGB.double(), id="float64 tensor"),
        pytest.param(RGB.clone().requires_grad_(), id="with gradients"),
        pytest.param([Image.fromarray(LEVELS)], id="list"),
        pytest.param((RGB,), id="tuple"),
        pytest.param([RGB[None]], id="list of a batch"),
        pytest.param(LEVELS[None], id="batch of arrays"),
    ],
)
def test_every_form_of_a_picture_means_the_same(given):
    (picture,) = read_pictures(given)
    assert_close(pixels_of(picture), RGB, atol=0, rtol=0)


def test_an_input_is_not_altered():
    before = RGB.clone()
    (picture,) = read_pictures(RGB)
    on_canvas(picture, Canvas(height=16, width=16, asked_height=16, asked_width=16))
    assert torch.equal(RGB, before)


def test_several_pictures_are_read_in_order_and_may_differ_in_form_and_size():
    read = read_pictures([LEVELS, RGB[:, :4], Image.fromarray(LEVELS[:2])])
    assert [size_of(one) for one in read] == [(6, 5), (4, 5), (2, 5)]
    assert torch.equal(pixels_of(read[1]), RGB[:, :4])


# B6
@pytest.mark.parametrize(
    "grey",
    [
        Image.fromarray(LEVELS[..., 0]),
        LEVELS[..., 0],
        LEVELS[..., :1],
        RGB[0],
        RGB[:1],
        RGB[None, :1],
    ],
    ids=["PIL", "array", "array with channel", "tensor", "tensor with channel", "batch"],
)
def test_grey_pictures_become_rgb(grey):
    (picture,) = read_pictures(grey)
    assert torch.equal(pixels_of(picture), RGB[:1].expand(3, -1, -1))


def test_black_and_white_pil_pictures_become_rgb():
    (picture,) = read_pictures(Image.fromarray(LEVELS[..., 0] > 127))
    assert torch.equal(pixels_of(picture), (RGB[:1] * 255 > 127).float().expand(3, -1, -1))


# B6
def test_what_is_transparent_shows_white():
    opacity = np.zeros((6, 5, 1), np.uint8)
    opacity[:3] = 255
    opacity[3:5] = 102
    shares = torch.from_numpy(opacity).permute(2, 0, 1).float() / 255
    expected = shares * RGB + 1 - shares
    rgba = np.concatenate([LEVELS, opacity], axis=2)
    (by_array,), (by_pil,) = read_pictures(rgba), read_pictures(Image.fromarray(rgba))
    assert_close(pixels_of(by_array), expected, atol=1e-6, rtol=0)  # float32
    assert_close(pixels_of(by_pil), expected, atol=1 / 255, rtol=0)  # rounded to a level
    (grey,) = read_pictures(rgba[..., [0, 3]])
    assert_close(pixels_of(grey), expected[:1].expand(3, -1, -1), atol=1e-6, rtol=0)


def test_a_palette_with_a_transparent_colour_shows_white_there():
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = 1
    (picture,) = read_pictures(image)
    assert (pixels_of(picture) * 255).round().int()[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pil_pictures_of_more_than_8_bits_are_refused(mode):
    with pytest.raises(ValueError, match=f"8 bits for each colour, got a PIL image in mode {mode}"):
        read_pictures(Image.new(mode, (4, 4)))


def test_four_dimensions_with_the_channels_of_latents_are_latents_if_it_is_a_tensor():
    latents = torch.randn(2, 4, 3, 3)
    source = read_source(latents, 0.5, 4)
    assert torch.equal(source.latents, latents)
    assert source.count == 2
    assert not source.pictures
    source = read_source(torch.rand(4, 6, 6), 0.5, 4)
    assert source.latents is None
    assert size_of(source.pictures[0]) == (6, 6)


def test_a_tensor_is_made_smaller_without_aliasing():
    stripes = torch.arange(64).remainder(2).float().expand(3, 64, 64)
    assert_close(resized(stripes, 8, 8), torch.full((3, 8, 8), 0.5), atol=0.05, rtol=0)  # the border is one stripe


@pytest.mark.parametrize(
    ("drawn", "asked"), [((64, 64), (64, 64)), ((64, 64), (50, 70)), ((64, 96), (30, 47)), ((96, 64), (300, 230))]
)
def test_a_picture_lies_where_it_is_cut_out_again(drawn, asked):
    """A ramp from corner to corner comes back as that ramp, over the whole size that was asked for."""
    rows, columns = (torch.linspace(0, 1, length) for length in asked)
    ramp = ((rows[:, None] + columns[None]) / 2).expand(3, -1, -1)
    canvas = Canvas(height=drawn[0], width=drawn[1], asked_height=asked[0], asked_width=asked[1])
    placed = on_canvas(ramp, canvas)
    assert placed.shape == (3, *drawn)
    pixel = 1 / min(*drawn, *asked)
    assert_close(fit_to_canvas(placed[None], canvas)[0], ramp, atol=1.5 * pixel, rtol=0)
