"""Projections that cannot be fused: quantised, stored in 8 bits, somewhere else, or with adapters."""

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig


def quantised(model):
    model.transformer_blocks[1].attn2.to_v = Linear8bitLt(32, 32, has_fp16_weights=False)


def stored_in_8_bits(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def elsewhere(model):
    model.transformer_blocks[1].attn1.to("meta")


def adapted(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["transformer_blocks.1.attn1.to_k"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantised, "to_v is a Linear8bitLt with"),
        (stored_in_8_bits, "to_q is a Linear with weights of torch.float8_e4m3fn"),
        (elsewhere, "to_q is a Linear with weights of torch.float32 on meta"),
        (adapted, "to_k is a Linear with"),
    ],
)
def test_what_a_copy_of_the_weight_would_not_equal_is_refused_before_anything_is_fused(
    make_transformer, change, message
):
    model = make_transformer()
    change(model)
    with pytest.raises(ValueError, match=f"only plain weights of 16 bits or more can be fused, and {message}"):
        model.fuse_qkv_projections()
    assert not any("to_qkv" in name or "to_kv" in name for name in model.state_dict())


@torch.no_grad()
def test_an_adapter_that_fused_projections_would_ignore_is_refused(make_transformer, inputs):
    model = make_transformer()
    model.fuse_qkv_projections()
    model.add_adapter(LoraConfig(r=2, target_modules=["transformer_blocks.1.attn2.to_k"]))
    with pytest.raises(ValueError, match=r"has no effect: unfuse_qkv_projections\(\)"):
        model(**inputs)
    model.unfuse_qkv_projections()
    model(**inputs)


@torch.no_grad()
def test_queries_of_cross_attention_are_not_fused_and_may_have_an_adapter(make_transformer, inputs):
    model = make_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q"], init_lora_weights=False))
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)  # float32, the same rows


@torch.no_grad()
def test_adapters_that_were_fused_into_the_weights_and_unloaded_are_no_hindrance(make_transformer, inputs):
    model = make_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    expected = model(**inputs).sample
    model.fuse_lora()
    model.unload_lora()
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)  # float32, weights merged
