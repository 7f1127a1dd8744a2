"""Norms against torch's own, over tokens and over channels, and the modulation that follows them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.layers import norms
from sana_sprint.layers.norms import ChannelRMSNorm, RMSNorm, SanaModulatedNorm, channel_norm, modulate

FLOAT32: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6}  # a mean over tens of values


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_rms_norm_is_torchs_with_scale_and_bias():
    norm = RMSNorm(24, eps=1e-2, bias=True)
    assert norm.bias is not None
    norm.weight.copy_(draw(24, seed=1))
    norm.bias.copy_(draw(24, seed=2))
    x = draw(2, 5, 24)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-2) + norm.bias, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_rms_norm_keeps_the_dtype_and_computes_in_float32(dtype):
    norm = RMSNorm(512)
    x = (200 * draw(4, 512)).to(dtype)  # squares overflow float16, their sum loses its terms in bfloat16
    found = norm(x)
    assert found.dtype == dtype
    # One rounding of the exact result.
    torch.testing.assert_close(found.float(), norm(x.float()), atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_piece_by_piece_is_the_norm_with_gradients(monkeypatch, dtype):
    monkeypatch.setattr(norms, "MAX_NUMBERS_AT_ONCE", 24 * 4)
    norm = RMSNorm(24, bias=True).to(dtype)
    x = draw(2, 3, 5, 24).to(dtype)  # 30 rows in pieces of 4
    before = x.clone()
    expected = norm(x)
    assert expected.requires_grad
    with torch.no_grad():
        found, moved = norm(x), norm(x.transpose(0, 2)).transpose(0, 2)
    assert found.dtype == dtype
    for some in (found, moved):
        # The mean of fewer rows may be summed in another order.
        torch.testing.assert_close(some, expected.detach(), atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert torch.equal(x, before)


@torch.no_grad()
def test_channel_norm_normalises_every_pixel_over_its_channels():
    norm = ChannelRMSNorm(6)
    assert norm.bias is not None
    norm.weight.copy_(draw(6, seed=1))
    norm.bias.copy_(draw(6, seed=2))
    x = draw(2, 6, 4, 5)
    expected = F.rms_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.eps) + norm.bias
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2), **FLOAT32)
    assert norm(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_configs_name_their_norms():
    assert type(channel_norm("rms_norm", 4)) is ChannelRMSNorm
    assert type(channel_norm("batch_norm", 4)) is torch.nn.BatchNorm2d
    with pytest.raises(ValueError, match=r'"rms_norm" or "batch_norm", got \'layer_norm\''):
        channel_norm("layer_norm", 4)


def test_modulation_scales_around_one_and_shifts():
    x, shift, scale = draw(2, 5, 4), draw(2, 1, 4, seed=1), draw(2, 1, 4, seed=2)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale) + shift, **FLOAT32)
    assert torch.equal(modulate(x, torch.zeros(1), torch.zeros(1)), x)


def test_the_last_norm_adds_the_embedding_to_both_rows_of_its_table():
    norm, tokens = SanaModulatedNorm(8), draw(2, 5, 8)
    table, embedding = draw(2, 8, seed=1), draw(2, 8, seed=2)
    shift, scale = table[0] + embedding, table[1] + embedding
    expected = F.layer_norm(tokens, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(norm(tokens, embedding, table), expected, **FLOAT32)
