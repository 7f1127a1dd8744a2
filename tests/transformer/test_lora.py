"""LoRA through PEFT and diffusers' own methods: on linear layers and on the 1x1 convolutions of the mix-FFN."""

from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear_1", "linear_2", "proj_out"]
SAME: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # float32, weights merged or not


@pytest.fixture
def adapted(make_transformer):
    """A transformer with an adapter that changes its output."""
    model = make_transformer()
    torch.manual_seed(3)  # of the other half of the weights, which PEFT draws
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_a_new_adapter_changes_nothing(make_transformer, inputs):
    model = make_transformer()
    expected = model(**inputs).sample
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    assert torch.equal(model(**inputs).sample, expected)


def test_only_the_adapter_learns_and_every_target_does(adapted, inputs):
    adapted.requires_grad_(False)
    adapted.enable_lora()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    adapted.enable_gradient_checkpointing()
    adapted(**inputs).sample.square().mean().backward()
    learning = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {target for target in TARGETS if any(f".{target}." in f".{name}." for name in learning)} == set(TARGETS)


@torch.no_grad()
def test_the_scale_of_the_call_scales_the_adapter(adapted, make_transformer, inputs):
    base, full = make_transformer()(**inputs).sample, adapted(**inputs).sample
    assert (full - base).abs().max() > 0.01
    assert torch.equal(adapted(**inputs, attention_kwargs={"scale": 1.0}).sample, full)
    torch.testing.assert_close(adapted(**inputs, attention_kwargs={"scale": 0.0}).sample, base, **SAME)
    half = adapted(**inputs, attention_kwargs={"scale": 0.5}).sample
    assert (half - base).abs().max() > 0.001
    assert (half - full).abs().max() > 0.001
    assert torch.equal(adapted(**inputs).sample, full)  # the scale of one call is not left behind


@torch.no_grad()
def test_a_fused_adapter_gives_the_same_and_can_be_taken_out(adapted, make_transformer, inputs):
    expected = adapted(**inputs).sample
    adapted.fuse_lora()
    torch.testing.assert_close(adapted(**inputs).sample, expected, **SAME)
    adapted.unfuse_lora()
    torch.testing.assert_close(adapted(**inputs).sample, expected, **SAME)
    adapted.disable_adapters()
    torch.testing.assert_close(adapted(**inputs).sample, make_transformer()(**inputs).sample, **SAME)


@pytest.mark.parametrize("direction", ["ours_to_theirs", "theirs_to_ours"])
@torch.no_grad()
def test_a_saved_adapter_loads_in_the_other_library(adapted, make_transformer, inputs, tmp_path, direction):
    expected, plain = adapted(**inputs).sample, make_transformer()
    reader = diffusers.SanaTransformer2DModel.from_config(plain.config).eval()
    reader.load_state_dict(plain.state_dict())
    name = "pytorch_lora_weights.safetensors"
    adapted.save_lora_adapter(tmp_path / "ours", weight_name=name)
    reader.load_lora_adapter(tmp_path / "ours", weight_name=name, prefix=None, adapter_name="default")
    if direction == "theirs_to_ours":
        reader.save_lora_adapter(tmp_path / "theirs", weight_name=name)
        reader = plain
        reader.load_lora_adapter(tmp_path / "theirs", weight_name=name, prefix=None)
    torch.testing.assert_close(reader(**inputs).sample, expected, **SAME)


@torch.no_grad()
def test_adapters_come_and_go_by_name(adapted, make_transformer, inputs):
    first = adapted(**inputs).sample
    adapted.add_adapter(LoraConfig(r=2, target_modules=["conv_point"], init_lora_weights=False), "other")
    assert adapted.active_adapters() == ["other"]
    assert not torch.allclose(adapted(**inputs).sample, first)
    adapted.set_adapters(["default", "other"], [1.0, 0.0])
    torch.testing.assert_close(adapted(**inputs).sample, first, **SAME)
    adapted.delete_adapters(["default", "other"])
    torch.testing.assert_close(adapted(**inputs).sample, make_transformer()(**inputs).sample, **SAME)
