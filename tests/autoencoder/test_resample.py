"""The channels-last forms of torch's own functions, and the blocks made of them."""

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.autoencoder.resample import (
    DCDownBlock2d,
    DCUpBlock2d,
    average_channels,
    channels_to_space,
    repeat_channels,
    space_to_channels,
)

FORMATS = pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
SHAPE = (2, 8, 6, 10)


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@FORMATS
def test_space_to_channels_is_pixel_unshuffle(draw, memory_format):
    x = draw(*SHAPE).to(memory_format=memory_format)
    assert torch.equal(space_to_channels(x), F.pixel_unshuffle(x, 2))
    assert is_channels_last(space_to_channels(x))


@FORMATS
def test_channels_to_space_is_pixel_shuffle(draw, memory_format):
    x = draw(*SHAPE).to(memory_format=memory_format)
    assert torch.equal(channels_to_space(x), F.pixel_shuffle(x, 2))
    assert is_channels_last(channels_to_space(x))
    assert torch.equal(space_to_channels(channels_to_space(x)), x)


@FORMATS
@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_averaging_takes_the_mean_of_neighbouring_channels(draw, memory_format, channels):
    x = draw(*SHAPE).to(memory_format=memory_format)
    expected = x.unflatten(1, (channels, -1)).mean(2)
    # The same eight numbers at most, added in another order.
    torch.testing.assert_close(average_channels(x, channels), expected, atol=1e-6, rtol=1e-6)


@FORMATS
@pytest.mark.parametrize("channels", [8, 16, 32])
def test_repeating_repeats_each_channel_in_place(draw, memory_format, channels):
    x = draw(*SHAPE).to(memory_format=memory_format)
    assert torch.equal(repeat_channels(x, channels), x.repeat_interleave(channels // 8, dim=1))
    # Averaging takes back what repeating did, up to the rounding of a mean of equal numbers.
    torch.testing.assert_close(average_channels(repeat_channels(x, channels), 8), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "no_shortcut"])
@pytest.mark.parametrize("unshuffle", [True, False], ids=["unshuffle", "strided"])
@torch.no_grad()
def test_a_down_block_halves_the_picture(draw, unshuffle, shortcut):
    block = DCDownBlock2d(8, 16, unshuffle, shortcut)
    x = draw(*SHAPE).contiguous(memory_format=torch.channels_last)
    y = block(x)
    assert y.shape == (2, 16, 3, 5)
    assert is_channels_last(y)
    for parameter in block.parameters():
        parameter.zero_()
    carried = average_channels(F.pixel_unshuffle(x, 2), 16)
    assert torch.equal(block(x), carried if shortcut else torch.zeros_like(carried))


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "no_shortcut"])
@pytest.mark.parametrize("interpolate", [True, False], ids=["interpolate", "shuffle"])
@torch.no_grad()
def test_an_up_block_doubles_the_picture(draw, interpolate, shortcut):
    block = DCUpBlock2d(8, 4, interpolate, shortcut)
    x = draw(*SHAPE).contiguous(memory_format=torch.channels_last)
    y = block(x)
    assert y.shape == (2, 4, 12, 20)
    assert is_channels_last(y)
    for parameter in block.parameters():
        parameter.zero_()
    carried = F.pixel_shuffle(x.repeat_interleave(2, dim=1), 2)
    assert torch.equal(block(x), carried if shortcut else torch.zeros_like(carried))


def test_channels_that_cannot_be_unshuffled_into_are_refused():
    with pytest.raises(ValueError, match="out_channels must be a multiple of 4 to be unshuffled into, got 6"):
        DCDownBlock2d(4, 6, unshuffle=True)
