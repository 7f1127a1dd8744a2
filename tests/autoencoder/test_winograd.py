"""Winograd's form of a convolution is the plain one, exact to rounding, and chosen only where it can take its place."""

import math

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.autoencoder import winograd
from sana_sprint.autoencoder.inner import InnerConv2d
from sana_sprint.autoencoder.winograd import winograd_conv2d, winograd_pays

# The smallest image that it is used for, of this width.
CHANNELS, WIDTH = winograd.MIN_CHANNELS, 160
HEIGHT = 2 * math.ceil(winograd.MIN_NUMBERS / (2 * CHANNELS * WIDTH))

multiplies_bfloat16 = pytest.mark.skipif(
    not winograd._multiplies_bfloat16(), reason="needs a CPU with AVX512-BF16 and without AMX, and torch 2.10"
)


@pytest.fixture
def in_use() -> InnerConv2d:
    """A convolution that is computed so, in bfloat16."""
    torch.manual_seed(0)
    return InnerConv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1).requires_grad_(False).bfloat16()


@pytest.fixture
def image(draw) -> torch.Tensor:
    """What it is used for."""
    return draw(1, CHANNELS, HEIGHT, WIDTH).bfloat16().contiguous(memory_format=torch.channels_last)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
@pytest.mark.parametrize("bias", [False, True], ids=["without_bias", "bias"])
@pytest.mark.parametrize("channels", [(6, 6), (6, 10), (10, 6)], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (18, 10)], ids=str)
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_it_is_the_plain_convolution(draw, monkeypatch, inner, bias, channels, size, rows_at_once):
    monkeypatch.setattr(winograd, "MAX_NUMBERS_AT_ONCE", rows_at_once * size[1] * max(channels))
    into, out_of = channels
    height = size[0] + (2 if inner else 0)
    x = draw(2, into, height, size[1]).double().contiguous(memory_format=torch.channels_last)
    weight = draw(out_of, into, 3, 3, seed=1).double()
    shift = draw(out_of, seed=2).double() if bias else None
    y = winograd_conv2d(x, weight, shift, inner)
    expected = F.conv2d(x, weight, shift, padding=(0, 1) if inner else 1)
    # The kernel's sums are made in float32.
    assert relative_error(y, expected) < 1e-6
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_in_bfloat16_it_has_four_times_the_error_of_the_plain_form(draw):
    x = F.silu(draw(1, 64, 32, 32)).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = draw(64, 64, 3, 3, seed=1).bfloat16()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    plain = relative_error(F.conv2d(x, weight, padding=1), exact)
    assert 0.001 < plain < 0.002
    assert relative_error(winograd_conv2d(x, weight), exact) < 4.5 * plain


@multiplies_bfloat16
@torch.no_grad()
def test_a_large_convolution_in_bfloat16_is_computed_so_and_of_the_weights_it_has_then(in_use, image):
    for x, inner in ((image, False), (torch.cat([image] * 2, 2), True)):
        assert torch.equal(in_use(x, inner), winograd_conv2d(x, in_use.weight, in_use.bias, inner))
    in_use.weight.mul_(-2)
    in_use.bias.mul_(-2)
    changed = in_use(image)
    exact = F.conv2d(image.double(), in_use.weight.double(), in_use.bias.double(), padding=1)
    assert relative_error(changed, exact) < 0.0075


@multiplies_bfloat16
def test_it_is_not_used_where_it_cannot_be_or_would_be_slower(in_use, image):
    weight, bias = in_use.weight, in_use.bias
    assert winograd_pays(image, weight, bias, inner=False)
    others = {
        "float32": (image.float(), weight.float(), bias.float(), False),
        "small": (image[:, :, : HEIGHT // 2], weight, bias, False),
        "small, inner": (image, weight, bias, True),
        "narrow": (torch.cat([image] * 2, 2)[:, : CHANNELS // 2], weight[:, : CHANNELS // 2], bias, False),
        "few results": (image, weight[: CHANNELS // 2], bias[: CHANNELS // 2], False),
        "odd width": (torch.cat([image] * 2, 2)[..., 1:], weight, bias, False),
        "odd height": (torch.cat([image] * 2, 2)[:, :, 1:], weight, bias, False),
        "meta": (image.to("meta"), weight.to("meta"), bias.to("meta"), False),
        "gradient": (image.clone().requires_grad_(), weight, bias, False),
        "gradient of the weight": (image, weight.clone().requires_grad_(), None, False),
    }
    assert [name for name, case in others.items() if winograd_pays(*case)] == []
    with torch.no_grad():
        assert winograd_pays(*others["gradient"])


@multiplies_bfloat16
@torch.no_grad()
def test_compiled_it_is_the_plain_form(in_use, image):
    compiled = torch.compile(in_use, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), F.conv2d(image, in_use.weight, in_use.bias, padding=1))
