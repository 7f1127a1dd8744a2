"""Attention processors, backends and fused projections, through the model's own switches."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

from sana_sprint.layers.attention import SanaCrossAttnProcessor

SAME: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # float32, the same sums in another order


@pytest.fixture
def default_backend(make_transformer):
    """Setting a model's backend sets diffusers' default for all that have none of their own; put it back."""
    yield
    make_transformer().set_attention_backend("native")


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_an_attention_backend_reaches_the_softmax_attention(make_transformer, inputs, default_backend, backend):
    model = make_transformer()
    expected = model(**inputs).sample
    model.set_attention_backend(backend)
    chosen = {
        str(getattr(processor._attention_backend, "value", None))
        for processor in model.attn_processors.values()
        if isinstance(processor, SanaCrossAttnProcessor)
    }
    assert chosen == {backend}
    torch.testing.assert_close(model(**inputs).sample, expected, **SAME)


@torch.no_grad()
def test_the_chosen_backend_is_the_one_that_computes(make_transformer, inputs, default_backend):
    model = make_transformer()
    # The fused CPU kernel is recorded under its own name; the mathematical backend has none.
    kernels = {}
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(**inputs)
        kernels[backend] = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels["native"]
    assert "aten::_scaled_dot_product_attention_math" in kernels["_native_math"]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in kernels["_native_math"]


@torch.no_grad()
def test_diffusers_own_processors_work_on_our_modules(make_transformer, inputs):
    model = make_transformer()
    expected = model(**inputs).sample
    theirs = {
        name: SanaLinearAttnProcessor2_0() if "attn1" in name else SanaAttnProcessor2_0()
        for name in model.attn_processors
    }
    model.set_attn_processor(dict(theirs))  # the setter empties the dictionary it is given
    assert model.attn_processors == theirs
    torch.testing.assert_close(model(**inputs).sample, expected, **SAME)


@torch.no_grad()
def test_fused_projections_change_nothing_and_can_be_taken_back(make_transformer, inputs):
    model = make_transformer(attention_bias=True)
    expected, names = model(**inputs).sample, list(model.state_dict())
    model.fuse_qkv_projections()
    assert all(block.attn1.fused_projections and block.attn2.fused_projections for block in model.transformer_blocks)
    torch.testing.assert_close(model(**inputs).sample, expected, **SAME)
    model.unfuse_qkv_projections()
    assert list(model.state_dict()) == names
    assert torch.equal(model(**inputs).sample, expected)
