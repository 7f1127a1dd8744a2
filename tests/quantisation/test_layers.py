"""Single layers in 8 and 4 bits: images and tokens, awkward sizes, state dicts, and the way back."""

import pytest
import torch
from diffusers import BitsAndBytesConfig
from torch import nn
from torch.testing import assert_close

from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.quantisation.layers import dequantised, quantised_like

# Rounding to int8 costs half a step of 1/127 of the largest in a row, to 4 bits half a gap of 16 levels per 64 weights.
BOUNDS = {"llm_int8": 0.02, "nf4": 0.15, "fp4": 0.2}


def quantised(layer: nn.Module, config: BitsAndBytesConfig) -> nn.Module:
    """The layer with its own weights, quantised, as a model's `load_state_dict` fills it."""
    new = quantised_like(layer, config)
    new.load_state_dict(layer.state_dict())
    return new.eval()


def linear(in_features: int = 64, out_features: int = 96, **options) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, **options)


def pointwise(in_channels: int = 64, out_channels: int = 96, **options) -> PointwiseConv2d:
    torch.manual_seed(0)
    return PointwiseConv2d(in_channels, out_channels, kernel_size=1, **options)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_pointwise_convolution_is_the_linear_layer_of_its_pixels(config, bias):
    convolution, image = pointwise(bias=bias), torch.randn(2, 64, 3, 5).contiguous(memory_format=torch.channels_last)
    line = linear(bias=bias)
    line.load_state_dict(
        {key: value.flatten(1) if value.ndim > 1 else value for key, value in convolution.state_dict().items()}
    )
    found = quantised(convolution, config)(image)
    expected = quantised(line, config)(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (80, 96), (64, 20), (32, 4)])
@torch.no_grad()
def test_sizes_that_bitsandbytes_cannot_pack_for_the_cpu_are_computed(config, error_of, in_features, out_features):
    layer, x = linear(in_features, out_features), torch.randn(2, 40, in_features)
    found = quantised(layer, config)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert 0 < error_of(found, layer(x)) < BOUNDS[config.quantization_method()]


@torch.no_grad()
def test_a_layer_takes_tokens_with_any_number_of_axes(config):
    layer, x = quantised(linear(), config), torch.randn(2, 3, 4, 64)
    assert_close(layer(x).flatten(0, 2), layer(x.flatten(0, 2)), atol=0, rtol=0)


@torch.no_grad()
def test_a_product_leaves_the_weights_as_they_were(config):
    layer = quantised(pointwise(), config)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(1, 64, 4, 4))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("has_run", [False, True])
@torch.no_grad()
def test_quantised_and_plain_weights_load_into_a_layer(config, has_run):
    source, x = pointwise(), torch.randn(1, 64, 4, 4)
    expected = quantised(source, config)
    for state in (expected.state_dict(), source.state_dict()):
        torch.manual_seed(1)
        layer = quantised(PointwiseConv2d(64, 96, kernel_size=1), config)
        if has_run:
            assert not torch.equal(layer(x), expected(x))
        layer.load_state_dict(state)
        assert torch.equal(layer(x), expected(x))


@pytest.mark.parametrize("make", [linear, pointwise])
@pytest.mark.parametrize("has_run", [False, True])
@torch.no_grad()
def test_a_dequantised_layer_has_the_shape_it_had_and_nearly_the_weights(config, error_of, make, has_run):
    source = make()
    layer = quantised(source, config)
    if has_run:
        layer(torch.randn(1, 64, 8, 64))
    found = dequantised(layer, torch.float32)
    assert type(found) is type(source)
    assert found.weight.shape == source.weight.shape
    assert 0 < error_of(found.weight, source.weight) < BOUNDS[config.quantization_method()]
    assert torch.equal(found.bias, source.bias)


@torch.no_grad()
def test_weights_kept_in_16_bits_are_quantised_at_every_product():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    source, x = pointwise(), torch.randn(1, 64, 4, 4)
    layer = quantised(source, config)
    assert torch.equal(layer.state_dict()["weight"], source.weight)
    assert torch.equal(layer(x), quantised(source, BitsAndBytesConfig(load_in_8bit=True))(x))
