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


def kernels_of(model, inputs) -> set[str]:
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**inputs)
    return {event.key for event in profile.key_averages()}


def test_every_model_computes_with_its_own_backend(make_transformer, inputs, default_backend):
    mathematical, fused = make_transformer(), make_transformer()
    mathematical.set_attention_backend("_native_math")
    fused.set_attention_backend("native")  # from here on also the default, which the first model does not follow
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernel in kernels_of(fused, inputs)
    assert kernel not in kernels_of(mathematical, inputs)


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
