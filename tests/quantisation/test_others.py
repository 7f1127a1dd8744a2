"""torchao and Quanto through diffusers' own configs, where they are installed: what is quantised, saved and undone."""

import json
from typing import Any

import pytest
import torch
from diffusers import QuantoConfig, TorchAoConfig
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as TheirTransformer
from peft import LoraConfig
from torch import nn

from sana_sprint import SanaTransformer2DModel
from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.quantisation.layers import PointwiseLinear
from sana_sprint.quantisation.quantisers import EXACT

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
FILE = "pytorch_lora_weights.safetensors"

# Kinds of weights, and the relative error of the velocity that they may cause.
TORCHAO: dict[str, tuple[dict[str, Any], float]] = {
    "Int8WeightOnlyConfig": ({}, 0.02),
    "Int8DynamicActivationInt8WeightConfig": ({}, 0.03),
    "Float8WeightOnlyConfig": ({}, 0.05),
    "IntxWeightOnlyConfig": ({"weight_dtype": torch.int4}, 0.15),
}
QUANTO = {"int8": 0.02, "float8": 0.05, "int4": 0.15}


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.fixture(params=TORCHAO)
def kind(request, torchao) -> str:
    """Every kind of weights of torchao in turn."""
    return request.param


@pytest.fixture
def config(kind, torchao) -> TorchAoConfig:
    return TorchAoConfig(getattr(torchao, kind)(**TORCHAO[kind][0]))


@pytest.fixture(params=QUANTO)
def weights(request) -> str:
    """Every kind of weights of Quanto in turn."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return request.param


def quantised(model: nn.Module) -> set[str]:
    """Names of the layers whose weights are made of other tensors, codes and scales."""
    return {
        name for name, module in model.named_modules() if hasattr(getattr(module, "weight", None), "__tensor_flatten__")
    }


def products_of(model: nn.Module, *kinds: type) -> set[str]:
    """Names of the layers of some kinds in the blocks."""
    return {name for name, module in model.named_modules() if isinstance(module, kinds) and "blocks." in name}


WAYS = [
    {},
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}},
    {"device_map": {"transformer_blocks": "cpu", "": "cpu"}},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_torchao_quantises_every_matrix_product_of_the_blocks_and_nothing_else(
    load, wide_transformer, velocity, error_of, config, kind, options
):
    model = load(quantization_config=config, **options)
    assert quantised(model) == products_of(wide_transformer, nn.Linear, PointwiseConv2d)
    assert 0 < error_of(velocity(model), velocity(wide_transformer)) < TORCHAO[kind][1]


def test_torchao_rounds_more_weights_to_less_harm_than_by_diffusers_rule(
    load, folder, velocity, wide_transformer, error_of, config
):
    """By which the embeddings of time, guidance and caption and the output are rounded, and no convolution."""
    exact = velocity(wide_transformer)
    theirs = TheirTransformer.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    assert error_of(velocity(load(quantization_config=config)), exact) < error_of(velocity(theirs), exact)


def test_a_folder_of_torchao_is_the_same_model_and_its_config_says_what_was_left(load, velocity, config, tmp_path):
    config.modules_to_not_convert = ["attn2.to_k"]
    model = load(quantization_config=config)
    assert config.modules_to_not_convert == ["attn2.to_k"]
    assert not [name for name in quantised(model) if "attn2.to_k" in name]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["modules_to_not_convert"] == [*EXACT, "attn2.to_k"]
    again = load(tmp_path)
    assert quantised(again) == quantised(model)
    assert torch.equal(velocity(again), velocity(model))


def test_a_folder_that_diffusers_has_quantised_with_torchao_loads(load, folder, velocity, error_of, config, tmp_path):
    theirs = TheirTransformer.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert quantised(ours) == {name for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
    assert len(products_of(ours, PointwiseConv2d)) == 4
    assert error_of(velocity(ours), velocity(theirs)) < 0.02  # two implementations in bfloat16


def test_convolutions_that_a_config_of_torchao_leaves_stay_convolutions(load, torchao):
    config = TorchAoConfig(torchao.FqnToConfig({"re:.*to_q": torchao.Int8WeightOnlyConfig()}))
    model = load(quantization_config=config)
    assert {name.rpartition(".")[2] for name in quantised(model)} == {"to_q"}
    assert not products_of(model, PointwiseLinear)
    assert len(products_of(model, PointwiseConv2d)) == 4


def test_a_model_of_torchao_that_is_dequantised_is_an_ordinary_one(
    load, velocity, wide_transformer, error_of, config, tmp_path
):
    model = load(quantization_config=config)
    before = velocity(model)
    model.dequantize()
    assert {type(module) for module in model.modules()} == {type(module) for module in wide_transformer.modules()}
    assert error_of(velocity(model), before) < 0.02  # activations are no longer rounded
    model.to(torch.float32).save_pretrained(tmp_path)
    assert not quantised(load(tmp_path))


def test_a_single_file_is_quantised_by_torchao_like_a_folder(load, folder, velocity, config):
    model = SanaTransformer2DModel.from_single_file(
        folder / "diffusion_pytorch_model.safetensors", quantization_config=config, torch_dtype=torch.bfloat16
    )
    assert torch.equal(velocity(model), velocity(load(quantization_config=config)))


def test_adapters_of_plain_weights_load_learn_and_are_fused_on_those_of_torchao(
    load, velocity, error_of, config, kind, tmp_path
):
    torch.manual_seed(0)
    plain, model = load(), load(quantization_config=config)
    base = velocity(model)
    plain.add_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False))
    plain.save_lora_adapter(tmp_path, weight_name=FILE)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE)
    expected = velocity(model)
    assert error_of(expected, base) > 0.1
    # The weights that are rounded are larger with the adapter than without.
    bound = 2 * TORCHAO[kind][1]
    assert error_of(expected, velocity(plain)) < bound

    model.enable_gradient_checkpointing()
    inputs = torch.randn(1, 32, 4, 6).bfloat16(), torch.randn(1, 7, 64).bfloat16(), torch.ones(1), torch.ones(1)
    model(*inputs).sample.float().square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if "lora_" in name}

    model.fuse_lora()
    assert error_of(velocity(model), expected) < bound
    model.unload_lora()
    assert error_of(velocity(model), expected) < bound


def test_quanto_quantises_the_linear_layers_of_the_blocks_and_nothing_else(
    load, wide_transformer, velocity, error_of, weights
):
    config = QuantoConfig(weights, modules_to_not_convert=["attn2", "transformer_blocks.0.attn1.to_q"])
    model = load(quantization_config=config)
    assert config.modules_to_not_convert == ["attn2", "transformer_blocks.0.attn1.to_q"]
    linear = {name for name in products_of(wide_transformer, nn.Linear) if "attn2" not in name}
    assert quantised(model) == linear - {"transformer_blocks.0.attn1.to_q"}
    assert 0 < error_of(velocity(model), velocity(wide_transformer)) < QUANTO[weights]


def test_a_folder_of_quanto_is_the_same_model(load, velocity, weights, tmp_path):
    model = load(quantization_config=QuantoConfig(weights))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantised(again) == quantised(model)
    assert {parameter.device.type for parameter in again.parameters()} == {"cpu"}
    assert torch.equal(velocity(again), velocity(model))


def test_a_folder_that_diffusers_has_quantised_with_quanto_loads(load, folder, velocity, error_of, weights, tmp_path):
    config = QuantoConfig(weights, modules_to_not_convert=[])
    theirs = TheirTransformer.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert quantised(ours) == {name for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
    assert error_of(velocity(ours), velocity(theirs)) < 0.02  # two implementations in bfloat16
