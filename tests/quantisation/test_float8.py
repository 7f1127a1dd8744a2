"""Products in float8 by torchao, in place: which, how far they round, compiled, and beside a folder loaded so."""

from copy import deepcopy

import pytest
import torch
from diffusers import TorchAoConfig
from torch import nn

from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.quantisation import float8
from sana_sprint.quantisation.float8 import multiplies_in_float8, quantise_to_float8
from sana_sprint.quantisation.quantisers import EXACT

LARGEST_ERROR = 0.05  # of the velocity


def in_float8(network: nn.Module) -> set[str]:
    """Names of the layers whose weights are of float8."""
    return {
        name
        for name, layer in network.named_modules()
        if getattr(getattr(layer, "weight", None), "qdata", torch.empty(0)).dtype == torch.float8_e4m3fn
    }


@pytest.fixture(scope="module")
def quantised(wide_transformer):
    """A copy in float8 of the transformer."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    network = deepcopy(wide_transformer)
    quantise_to_float8(network)
    return network


def test_products_of_the_blocks_are_in_float8_and_nothing_else(wide_transformer, quantised):
    products = {
        name for name, layer in wide_transformer.named_modules() if isinstance(layer, (nn.Linear, PointwiseConv2d))
    }
    exact = {name for name in products if any(f".{part}." in f".{name}." for part in EXACT)}
    assert exact
    assert any("conv_inverted" in name for name in products)
    assert in_float8(quantised) == products - exact


def test_velocities_are_rounded_and_little(wide_transformer, quantised, velocity, error_of):
    assert 0 < error_of(velocity(quantised), velocity(wide_transformer)) < LARGEST_ERROR


def test_weights_alone_are_those_of_a_folder_that_is_loaded_so(load, quantised, velocity):
    torchao = pytest.importorskip("torchao.quantization")
    loaded = load(quantization_config=TorchAoConfig(torchao.Float8WeightOnlyConfig()))
    assert in_float8(loaded) == in_float8(quantised)
    assert torch.equal(velocity(loaded), velocity(quantised))


def test_it_compiles_without_a_break(quantised, velocity, error_of):
    torch._dynamo.reset()
    expected = velocity(quantised)
    network = deepcopy(quantised)
    network.compile(fullgraph=True, backend="aot_eager")
    assert error_of(velocity(network), expected) < 1e-2  # of bfloat16


def test_a_device_without_such_products_keeps_them(quantised):
    assert not multiplies_in_float8(torch.device("cpu"))
    layer = quantised.transformer_blocks[0].attn1.to_q
    assert layer.weight.act_quant_kwargs is None


def test_without_torchao_the_error_names_the_extra(wide_transformer, monkeypatch):
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"float8 needs torchao: pip install 'sana-sprint\[float8\]'"):
        quantise_to_float8(wide_transformer)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_both_factors_are_in_float8(wide_transformer, velocity, error_of):
    pytest.importorskip("torchao", reason="torchao is not installed")
    if not multiplies_in_float8(torch.device("cuda")):
        pytest.skip("this GPU does not multiply in float8")
    network = deepcopy(wide_transformer).cuda()
    expected = velocity(network)
    quantise_to_float8(network)
    assert network.transformer_blocks[0].attn1.to_q.weight.act_quant_kwargs is not None
    assert 0 < error_of(velocity(network), expected) < 2 * LARGEST_ERROR
