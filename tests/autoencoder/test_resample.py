"""The channels-last forms of torch's own functions, and the blocks made of them."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from sana_sprint.autoencoder.resample import (
    DCDownBlock2d,
    DCUpBlock2d,
    DoublingConv2d,
    average_channels,
    channels_to_space,
    repeat_channels,
    repeat_into_space,
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


@FORMATS
@pytest.mark.parametrize("channels", [2, 4, 6, 8, 12, 16])
def test_repeating_into_space_is_repeating_and_then_shuffling(draw, memory_format, channels):
    x = draw(*SHAPE).to(memory_format=memory_format)
    cells = repeat_into_space(x, channels)
    expected = F.pixel_shuffle(x.repeat_interleave(channels // 2, dim=1), 2)
    assert torch.equal(cells.flatten(3, 4).flatten(1, 2).movedim(-1, 1), expected)
    is_view = cells.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert is_view == (channels in (2, 4, 8))


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


def doubled_and_convolved(x: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)


@FORMATS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 7)], ids=str)
@torch.no_grad()
def test_a_doubling_convolution_is_nearest_neighbour_and_a_convolution(draw, memory_format, bias, size):
    conv = DoublingConv2d(8, 4, kernel_size=3, padding=1, bias=bias).to(memory_format=memory_format)
    x = draw(2, 8, *size).to(memory_format=memory_format)
    # float32: sums of 72 terms.
    torch.testing.assert_close(conv(x, doubled=True), doubled_and_convolved(x, conv), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no_gradient"])
def test_inner_rows_of_a_doubling_convolution_are_those_of_the_whole(draw, gradient):
    conv, x = DoublingConv2d(8, 4, kernel_size=3, padding=1), draw(*SHAPE)
    conv.requires_grad_(gradient)
    for doubled, rows in ((False, slice(1, -1)), (True, slice(2, -2))):
        found, whole = conv(x, inner=True, doubled=doubled), conv(x, doubled=doubled)
        torch.testing.assert_close(found, whole[:, :, rows], atol=1e-5, rtol=1e-5)  # float32, sums of 72 terms


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "plain"])
@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "no_shortcut"])
@pytest.mark.parametrize("interpolate", [True, False], ids=["interpolate", "shuffle"])
def test_inner_rows_of_an_up_block_are_those_of_the_whole_and_so_are_their_gradients(
    draw, interpolate, shortcut, adapted
):
    block = DCUpBlock2d(8, 4, interpolate, shortcut)
    if adapted:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False), block)
    x = draw(*SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    found, expected = block(x, inner=True), block(x)[:, :, 2:-2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # float32, sums of 72 terms
    pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)), strict=True)
    for pair in pairs:
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)  # sums over 320 pixels of those
    with torch.no_grad():
        inside = block(x, inner=True)
    torch.testing.assert_close(inside, expected, atol=1e-5, rtol=1e-5)
    assert adapted or is_channels_last(inside)


@torch.no_grad()
def test_a_doubling_convolution_keeps_nothing_of_weights_that_have_changed(draw):
    conv, x = DoublingConv2d(8, 4, kernel_size=3, padding=1), draw(*SHAPE)
    others = {name: draw(*value.shape, seed=1) for name, value in conv.state_dict().items()}
    conv(x, doubled=True)
    names = set(vars(conv))
    conv.load_state_dict(others)
    torch.testing.assert_close(conv(x, doubled=True), doubled_and_convolved(x, conv), atol=1e-5, rtol=1e-5)
    conv.weight.data[0] = 0
    torch.testing.assert_close(conv(x, doubled=True), doubled_and_convolved(x, conv), atol=1e-5, rtol=1e-5)
    assert conv.double()(x.double(), doubled=True).dtype == torch.float64
    assert set(vars(conv)) == names
    assert set(conv.state_dict()) == set(others)


def test_gradients_of_a_doubling_convolution_are_those_of_its_plain_form(draw):
    conv, x = DoublingConv2d(8, 4, kernel_size=3, padding=1), draw(*SHAPE).requires_grad_()
    inputs = (x, *conv.parameters())
    found = torch.autograd.grad(conv(x, doubled=True).square().sum(), inputs)
    expected = torch.autograd.grad(doubled_and_convolved(x, conv).square().sum(), inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@torch.no_grad()
def test_sums_of_bfloat16_weights_cost_less_than_half_a_rounding(draw):
    conv, x = DoublingConv2d(64, 32, kernel_size=3, padding=1), draw(1, 64, 12, 12).bfloat16()
    conv.bfloat16().to(memory_format=torch.channels_last)
    found, plain = conv(x, doubled=True), doubled_and_convolved(x, conv)
    exact = doubled_and_convolved(x.float(), conv.float())
    # The plain form rounds once, its result; the sums are rounded as well.
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()


@torch.no_grad()
def test_an_adapter_around_a_doubling_convolution_sees_what_it_would_around_a_plain_one(draw):
    class Adapter(torch.nn.Module):
        def __init__(self, base: DoublingConv2d) -> None:
            super().__init__()
            self.base = base
            self.down = type(base)(8, 2, kernel_size=3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.down(x).repeat(1, 2, 1, 1)

    block, x = DCUpBlock2d(8, 4, interpolate=True, shortcut=False), draw(*SHAPE)
    assert isinstance(block.conv, DoublingConv2d)
    adapter = Adapter(block.conv)
    expected = doubled_and_convolved(x, adapter.base) + doubled_and_convolved(x, adapter.down).repeat(1, 2, 1, 1)
    block.conv = adapter
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", [True, False], ids=["inner", "whole"])
@torch.no_grad()
def test_an_up_block_compiles_without_a_graph_break(draw, inner):
    torch._dynamo.reset()
    block, x = DCUpBlock2d(8, 4, interpolate=True), draw(*SHAPE)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, inner), block(x, inner), atol=1e-6, rtol=1e-5)  # float32
    torch._dynamo.reset()


def test_channels_that_cannot_be_unshuffled_into_are_refused():
    with pytest.raises(ValueError, match="out_channels must be a multiple of 4 to be unshuffled into, got 6"):
        DCDownBlock2d(4, 6, unshuffle=True)
