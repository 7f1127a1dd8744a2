"""Linear attention against its definition, and the module that projects for it."""

from typing import Any

import pytest
import torch

from sana_sprint.layers.attention import (
    SanaAttention,
    SanaCrossAttnProcessor,
    SanaLinearAttnProcessor,
    linear_attention,
)

HEADS, FEATURES = 3, 8
# Fewer tokens than features, as many, and more: the two associations of the products meet at FEATURES.
LENGTHS = [1, FEATURES, FEATURES + 1, 50]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Every token's mean of the values, weighted by relu(q) relu(k), in float64."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = query.relu() @ key.relu().transpose(2, 3)
    return ((scores / (scores.sum(-1, keepdim=True) + 1e-15)) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", LENGTHS)
def test_linear_attention_is_the_quadratic_formula(length):
    query, key, value = (draw(2, length, HEADS, FEATURES, seed=seed) for seed in range(3))
    found = linear_attention(query, key, value).double()
    # float32, sums over up to 50 tokens.
    torch.testing.assert_close(found, by_definition(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_token_without_any_kernel_attends_to_nothing(length):
    query, key, value = (draw(1, length, HEADS, FEATURES, seed=seed) for seed in range(3))
    query[:, 0] = -query[:, 0].abs()
    found = linear_attention(query, key, value)
    assert torch.equal(found[:, 0], torch.zeros_like(found[:, 0]))
    assert torch.equal(linear_attention(query, -key.abs(), value), torch.zeros_like(found))


@pytest.mark.parametrize("length", [4, 4096])
def test_equal_values_come_back_whatever_the_weights(length):
    query, key = draw(1, length, HEADS, FEATURES).abs(), draw(1, length, HEADS, FEATURES, seed=1).abs()
    value = draw(1, 1, HEADS, FEATURES, seed=2).expand(1, length, -1, -1)
    # A weighted mean of one number: off by the rounding of a float32 sum.
    torch.testing.assert_close(linear_attention(query, key, value), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [4, 2048])
def test_half_precision_sums_neither_overflow_nor_lose_terms(dtype, length):
    # 2048 products of 30 * 30 are far beyond float16's 65504.
    query, key, value = (30 * draw(1, length, HEADS, FEATURES, seed=seed).to(dtype) for seed in range(3))
    found = linear_attention(query, key, value)
    assert found.dtype == dtype
    # Everything but the last rounding is float32: half a unit of the result's dtype.
    tolerance: dict[str, Any] = {"rtol": torch.finfo(dtype).eps, "atol": 1e-2}
    torch.testing.assert_close(found.double(), by_definition(query, key, value), **tolerance)


def test_self_and_cross_attention_get_their_processors():
    alone = SanaAttention(16, heads=2, head_dim=8)
    across = SanaAttention(16, heads=2, head_dim=8, context_dim=12)
    assert type(alone.get_processor()) is SanaLinearAttnProcessor
    assert type(across.get_processor()) is SanaCrossAttnProcessor
    assert across(draw(2, 5, 16), draw(2, 3, 12)).shape == (2, 5, 16)


@pytest.mark.parametrize("context_dim", [None, 12], ids=["self", "cross"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
@torch.no_grad()
def test_fused_projections_give_what_separate_ones_give(context_dim, bias, qk_norm):
    attention = SanaAttention(16, heads=2, head_dim=4, context_dim=context_dim, bias=bias, qk_norm=qk_norm)
    context = None if context_dim is None else draw(2, 3, context_dim, seed=1)
    separate = attention(draw(2, 5, 16), context)
    names = set(attention.state_dict())
    attention.fuse_projections()
    assert hasattr(attention, "to_qkv" if context_dim is None else "to_kv")
    # One matrix product instead of three, of the same rows: a library may block it otherwise.
    torch.testing.assert_close(attention(draw(2, 5, 16), context), separate, atol=1e-6, rtol=1e-6)
    attention.unfuse_projections()
    assert set(attention.state_dict()) == names
    assert torch.equal(attention(draw(2, 5, 16), context), separate)


@torch.no_grad()
def test_float16_attention_saturates_where_it_would_overflow():
    attention = SanaAttention(8, heads=1, head_dim=8).half()
    attention.to_out[0].weight.copy_(60000 * torch.eye(8))
    for projection, factor in [(attention.to_q, 1), (attention.to_k, 1), (attention.to_v, 2)]:
        projection.weight.copy_(factor * torch.eye(8))
    attended = attention(torch.ones(1, 4, 8, dtype=torch.float16))
    assert attended.isfinite().all()
    assert attended.max() == 65504


def test_an_unknown_norm_of_query_and_key_is_refused():
    with pytest.raises(ValueError, match=r'qk_norm must be None or "rms_norm_across_heads", got \'layer_norm\''):
        SanaAttention(16, heads=2, head_dim=8, qk_norm="layer_norm")
