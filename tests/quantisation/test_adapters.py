"""LoRA through PEFT on 8 and 4 bits: the same files as on plain weights, training, fusing, and what is refused."""

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from diffusers import BitsAndBytesConfig
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from sana_sprint import SanaTransformer2DModel
from sana_sprint.quantisation.layers import quantised_layers

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
FILE = "pytorch_lora_weights.safetensors"
EIGHT = BitsAndBytesConfig(load_in_8bit=True)


def adapt(model: SanaTransformer2DModel, name: str = "default", seed: int = 3, **options) -> SanaTransformer2DModel:
    """The model with an adapter that changes its velocity by a good quarter; its weights are numbers of bfloat16."""
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}.weight" in key:
            size = 0.1 if "lora_A" in key else 0.05
            parameter.data = (size * torch.randn(parameter.shape, generator=generator)).bfloat16().to(parameter.dtype)
    return model


def bound_of(config: BitsAndBytesConfig) -> float:
    """The relative error of a velocity that quantised weights may cause, as without adapters."""
    return 0.03 if config.load_in_8bit else 0.25


@pytest.fixture
def adapted(load, config) -> SanaTransformer2DModel:
    return adapt(load(quantization_config=config))


@pytest.fixture(scope="session")
def gradients() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """Of every parameter that has one, after a forward and backward pass over one picture."""

    def run(model: nn.Module) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        latents, caption = torch.randn(1, 32, 4, 6, generator=generator), torch.randn(1, 7, 64, generator=generator)
        angle, scale = torch.tensor([0.3]), torch.tensor([0.45])
        model.zero_grad()
        model(latents.bfloat16(), caption.bfloat16(), angle, scale).sample.float().square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    return run


def test_a_new_adapter_changes_neither_the_velocity_nor_the_callers_config(load, velocity, config):
    model, settings = load(quantization_config=config), LoraConfig(r=4, target_modules=TARGETS)
    expected, before = velocity(model), dict(vars(settings))
    model.add_adapter(settings)
    assert torch.equal(velocity(model), expected)
    assert vars(settings) == before


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("direction", ["plain to quantised", "quantised to plain"])
def test_an_adapters_file_fits_plain_and_quantised_weights(
    load, velocity, error_of, config, tmp_path, direction, low_cpu_mem_usage
):
    plain, quantised = load(), load(quantization_config=config)
    writer, reader = (plain, quantised) if direction == "plain to quantised" else (quantised, plain)
    base = velocity(writer)
    adapt(writer).save_lora_adapter(tmp_path, weight_name=FILE)
    reader.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE, low_cpu_mem_usage=low_cpu_mem_usage)
    written, read = (
        get_peft_model_state_dict(model, adapter_name=name)
        for model, name in ((writer, "default"), (reader, "default_0"))
    )
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key].float(), read[key].float()) for key in written)
    assert {value.ndim for key, value in read.items() if "conv_" in key} == {4}
    assert error_of(velocity(writer), base) > 0.2
    assert error_of(velocity(quantised), velocity(plain)) < bound_of(config)


@torch.no_grad()
def test_an_adapted_convolution_adds_its_two_halves_to_every_pixel(adapted):
    layer, x = adapted.transformer_blocks[0].ff.conv_inverted, torch.randn(2, 128, 3, 5)
    up, down = (half["default"].weight.flatten(1) for half in (layer.lora_B, layer.lora_A))
    added = torch.einsum("oi,bihw->bohw", 2 * (up @ down).float(), x)  # alpha is twice the rank
    # The halves are bfloat16 where 4-bit layers compute in it, and round what they hand on.
    precision = {"atol": 1e-5, "rtol": 1e-5} if up.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    assert_close(layer(x) - layer.base_layer(x), added, **precision)


def test_only_adapters_learn_and_with_gradient_checkpointing_the_same(adapted, gradients):
    adapted.train()
    expected = gradients(adapted)
    assert expected.keys() == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {name.rpartition(".lora_")[0].partition("blocks.")[2] for name in expected} == {
        name.partition("blocks.")[2].removesuffix(".base_layer") for name, _ in quantised_layers(adapted)
    }
    adapted.enable_gradient_checkpointing()
    found = gradients(adapted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(value.abs().max() > 0 for value in expected.values())


def test_gradients_are_nearly_those_through_the_dequantised_weights(adapted, gradients, error_of):
    found = gradients(adapted)
    expected = gradients(adapted.dequantize())
    # In 8 bits the activations are rounded, too.
    assert max(error_of(found[name], expected[name]) for name in expected) < 0.15


def test_an_adapter_learns_and_leaves_the_weights_as_they_were(load, equal_states, config):
    model = load(quantization_config=config)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    model.enable_gradient_checkpointing()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    latents, caption = torch.randn(2, 32, 4, 6, generator=generator), torch.randn(2, 7, 64, generator=generator)
    losses = []
    for _ in range(8):
        sample = model(
            latents.bfloat16(), caption.bfloat16(), torch.tensor([0.3, 0.8]), torch.tensor([0.4, 0.4])
        ).sample
        loss = (sample.float() - latents).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.unload_lora()
    assert equal_states(model, load(quantization_config=config))


def test_a_fused_adapter_gives_nearly_the_same_and_comes_out_without_a_trace(
    load, adapted, velocity, error_of, equal_states, config
):
    adapter = velocity(adapted)
    adapted.fuse_lora()
    assert 0 < error_of(velocity(adapted), adapter) < bound_of(config)
    adapted.unfuse_lora()
    assert torch.equal(velocity(adapted), adapter)
    adapted.fuse_lora(lora_scale=0.5)
    assert error_of(velocity(adapted), adapter) > 0.05
    adapted.disable_adapters()
    plain = load(quantization_config=config)
    assert torch.equal(velocity(adapted), velocity(plain))
    adapted.unload_lora()
    assert equal_states(adapted, plain)


def test_a_model_with_a_fused_adapter_saves_and_loads_like_any_other(adapted, load, velocity, equal_states, tmp_path):
    adapted.fuse_lora()
    adapted.unload_lora()
    adapted.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert equal_states(again, adapted)
    assert torch.equal(velocity(again), velocity(adapted))


def test_adapters_come_go_and_are_weighed_by_name(load, velocity, error_of, config):
    model = load(quantization_config=config)
    base = velocity(model)
    first = velocity(adapt(model, "first"))
    second = velocity(adapt(model, "second", seed=4, target_modules=["conv_point", "to_out.0"], r=2))
    model.set_adapters(["first", "second"], [1.0, 0.0])
    assert error_of(velocity(model), first) < 0.01  # bfloat16
    model.set_adapters(["first", "second"])
    both = velocity(model)
    assert min(error_of(both, first), error_of(both, second)) > 0.05
    model.fuse_lora(adapter_names=["first", "second"])
    assert error_of(velocity(model), both) < bound_of(config)
    model.unfuse_lora()
    assert torch.equal(velocity(model), both)
    model.delete_adapters(["first", "second"])
    assert torch.equal(velocity(model), base)


def test_weights_kept_in_16_bits_are_fused_as_what_they_are(load, velocity, error_of):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    model = adapt(load(quantization_config=config))
    expected = velocity(model)
    model.fuse_lora()
    assert error_of(velocity(model), expected) < 0.03


@torch.no_grad()
def test_the_bias_of_an_adapter_is_fused_with_its_scale(load, config):
    model = adapt(load(quantization_config=config), lora_bias=True, target_modules=["conv_inverted"])
    layer = model.transformer_blocks[0].ff.conv_inverted
    layer.lora_B["default"].bias.fill_(0.5)
    zero, before = torch.zeros(1, 128, 2, 2, dtype=torch.bfloat16), layer.base_layer.bias.clone()
    expected = layer(zero)
    model.fuse_lora()
    assert_close(layer(zero), expected)
    assert_close(layer.base_layer.bias, before + 1)  # alpha is twice the rank
    model.unfuse_lora()
    assert torch.equal(layer.base_layer.bias, before)


def test_what_cannot_be_adapted_or_fused_is_refused(load, adapted):
    with pytest.raises(ValueError, match="plain LoRA, got DoraLinearVariant: leave conv_inverted and conv_point out"):
        load(quantization_config=EIGHT).add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["conv_point"]))
    with pytest.warns(UserWarning, match="has no bias"):
        unbiased = adapt(load(quantization_config=EIGHT), lora_bias=True, target_modules=["conv_point"])
    with pytest.raises(ValueError, match="the bias of default cannot be fused into a layer that has none"):
        unbiased.fuse_lora()
    adapted.transformer_blocks[1].attn1.to_q.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in one of the adapters default"):
        adapted.fuse_lora(safe_fusing=True)
    adapted.unfuse_lora()
    with pytest.raises(ValueError, match="unload and load them again"):
        adapted.dequantize().fuse_lora()


def test_layers_that_are_not_ours_are_adapted_as_before(load):
    load(quantization_config=EIGHT)
    plain = nn.ModuleDict(
        {"line": nn.Linear(8, 8), "image": nn.Conv2d(8, 8, 1), "four": bnb.nn.Linear4bit(8, 8, quant_type="nf4")}
    )
    plain.is_loaded_in_4bit = True
    found = get_peft_model(plain, LoraConfig(r=2, target_modules=["line", "image", "four"])).base_model.model
    assert [type(found[name]) for name in plain] == [lora.Linear, lora.Conv2d, lora.Linear4bit]
