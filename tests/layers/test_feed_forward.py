"""The mix-FFN: its 1x1 convolutions, its formula, and the memory format that lets tokens pass without a copy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.layers.feed_forward import GLUMBConv, PointwiseConv2d

FLOAT32: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}  # sums of tens of terms


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@torch.no_grad()
def test_a_pointwise_convolution_is_a_convolution(bias, memory_format):
    layer = PointwiseConv2d(6, 10, kernel_size=1, bias=bias)
    plain = torch.nn.Conv2d(6, 10, kernel_size=1, bias=bias)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = draw(2, 6, 3, 5).to(memory_format=memory_format)
    torch.testing.assert_close(layer(x), plain(x), **FLOAT32)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm_type", [None, "rms_norm"])
@pytest.mark.parametrize("residual_connection", [True, False])
@torch.no_grad()
def test_the_mix_ffn_is_its_formula(norm_type, residual_connection):
    layer = GLUMBConv(6, 6, expand_ratio=2.5, norm_type=norm_type, residual_connection=residual_connection)
    x = draw(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    expanded = F.silu(F.conv2d(x, layer.conv_inverted.weight, layer.conv_inverted.bias))
    mixed = F.conv2d(expanded, layer.conv_depth.weight, layer.conv_depth.bias, padding=1, groups=30)
    value, gate = mixed[:, :15], mixed[:, 15:]
    y = F.conv2d(value * gate * gate.sigmoid(), layer.conv_point.weight)
    if norm_type is not None:
        y = F.rms_norm(y.movedim(1, -1), (6,), eps=1e-5).movedim(-1, 1)
    torch.testing.assert_close(layer(x), x + y if residual_connection else y, **FLOAT32)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r'norm_type must be None or "rms_norm", got \'batch_norm\''):
        GLUMBConv(4, 4, norm_type="batch_norm")
