"""LoRA on the ControlNet through diffusers' own methods: several with weights, fused, and files for its class."""

from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig

TARGETS = ["to_q", "to_v", "conv_inverted", "conv_point", "input_block", "controlnet_blocks.0"]
NAME = "pytorch_lora_weights.safetensors"
SAME: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}  # float32, weights merged or not
PLAIN = {"guidance_embeds": False, "qk_norm": None}  # the config that diffusers' class can have


def last_residual(control, inputs, drawing) -> torch.Tensor:
    if not getattr(control.config, "guidance_embeds", False):
        inputs = {name: value for name, value in inputs.items() if name != "guidance"}
    return control(**inputs, controlnet_cond=drawing, return_dict=False)[0][-1]


@pytest.fixture
def adapted(make_control):
    """A ControlNet with two adapters."""
    control = make_control(**PLAIN)
    torch.manual_seed(3)
    control.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False), "first")
    control.add_adapter(LoraConfig(r=3, target_modules=["conv_point"], init_lora_weights=False), "second")
    return control


@torch.no_grad()
def test_several_adapters_have_a_weight_each(adapted, make_control, inputs, drawing):
    plain = last_residual(make_control(**PLAIN), inputs, drawing)
    adapted.set_adapters(["first", "second"], [1.0, 0.0])
    first = last_residual(adapted, inputs, drawing)
    adapted.set_adapters("first")
    torch.testing.assert_close(last_residual(adapted, inputs, drawing), first, **SAME)
    adapted.set_adapters(["first", "second"], [0.5, 0.5])
    both = last_residual(adapted, inputs, drawing)
    assert min((both - other).abs().max() for other in (plain, first)) > 0.01
    adapted.delete_adapters(["first", "second"])
    torch.testing.assert_close(last_residual(adapted, inputs, drawing), plain, **SAME)


@torch.no_grad()
def test_adapters_are_fused_taken_out_and_unloaded(adapted, make_control, inputs, drawing):
    adapted.set_adapters(["first", "second"], [0.5, -0.5])
    expected = last_residual(adapted, inputs, drawing)
    adapted.fuse_lora()
    torch.testing.assert_close(last_residual(adapted, inputs, drawing), expected, **SAME)
    adapted.unfuse_lora()
    torch.testing.assert_close(last_residual(adapted, inputs, drawing), expected, **SAME)
    adapted.unload_lora()
    plain = last_residual(make_control(**PLAIN), inputs, drawing)
    torch.testing.assert_close(last_residual(adapted, inputs, drawing), plain, **SAME)


@pytest.mark.parametrize("direction", ["ours_to_theirs", "theirs_to_ours"])
@torch.no_grad()
def test_a_saved_adapter_loads_in_the_other_library(adapted, make_control, inputs, drawing, tmp_path, direction):
    adapted.set_adapters("first")
    expected, plain = last_residual(adapted, inputs, drawing), make_control(**PLAIN)
    theirs = diffusers.SanaControlNetModel.from_config(plain.config).eval()
    theirs.load_state_dict(plain.state_dict())
    adapted.save_lora_adapter(tmp_path / "ours", adapter_name="first", weight_name=NAME)
    theirs.load_lora_adapter(tmp_path / "ours", weight_name=NAME, prefix=None, adapter_name="default")
    reader = theirs
    if direction == "theirs_to_ours":
        theirs.save_lora_adapter(tmp_path / "theirs", weight_name=NAME)
        plain.load_lora_adapter(tmp_path / "theirs", weight_name=NAME, prefix=None)
        reader = plain
    torch.testing.assert_close(last_residual(reader, inputs, drawing), expected, **SAME)


@torch.no_grad()
def test_only_the_weights_of_the_prefix_are_taken_from_a_file_of_two_networks(
    adapted, make_control, make_transformer, inputs, drawing, tmp_path
):
    adapted.set_adapters("first")
    expected = last_residual(adapted, inputs, drawing)
    adapted.save_lora_adapter(tmp_path, adapter_name="first", weight_name=NAME)
    weights = diffusers.SanaSprintPipeline.lora_state_dict(tmp_path / NAME)
    both = {
        **{f"controlnet.{name}": value for name, value in weights.items()},
        **{f"transformer.{name}": 2 * value for name, value in weights.items() if "attn" in name},
    }
    control, transformer = make_control(**PLAIN), make_transformer()
    control.load_lora_adapter(dict(both), prefix="controlnet")
    transformer.load_lora_adapter(dict(both))
    torch.testing.assert_close(last_residual(control, inputs, drawing), expected, **SAME)
    assert not any("lora" in name and "attn" not in name for name, _ in transformer.named_parameters())
