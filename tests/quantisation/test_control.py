"""The ControlNet loaded in 8 and 4 bits: what is quantised, what it gives, and that its folder is the same model."""

import json
from typing import Any

import pytest
import torch

from sana_sprint import SanaControlNetModel
from sana_sprint.quantisation.layers import quantised_layers

# Relative errors of residuals that rounding weights may cause, as for the transformer's velocity.
ERRORS = {8: 0.03, 4: 0.25}


@pytest.fixture(params=["after", "before"])
def control(request, wide_transformer) -> SanaControlNetModel:
    """In bfloat16, and as if it had learnt something."""
    model = SanaControlNetModel.from_transformer(wide_transformer, num_layers=1, residual_placement=request.param)
    generator = torch.Generator().manual_seed(6)
    for way in (model.input_block, *model.controlnet_blocks):
        way.weight.data = 0.1 * torch.randn(way.weight.shape, generator=generator).bfloat16()
    return model.eval()


@torch.no_grad()
def residual_of(model: SanaControlNetModel) -> torch.Tensor:
    """For two pictures of 4 x 6 cells, in float32."""
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 32, 4, 6, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(2, 7, 64, generator=generator).bfloat16(),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([0.45, 0.2]),
        "controlnet_cond": torch.randn(2, 32, 4, 6, generator=generator).bfloat16(),
    }
    (samples,) = model(**inputs, return_dict=False)
    return getattr(samples, "samples", samples)[0].float()


def test_the_blocks_are_quantised_and_the_ways_in_and_out_are_not(control, config, error_of, equal_states, tmp_path):
    control.save_pretrained(tmp_path / "plain")
    options: dict[str, Any] = {"quantization_config": config, "torch_dtype": torch.bfloat16, "device_map": "cpu"}
    model = SanaControlNetModel.from_pretrained(tmp_path / "plain", **options)
    quantised = {name for name, _ in quantised_layers(model)}
    blocks = {name.split(".")[0] for name in quantised}
    assert blocks == {"transformer_blocks"} | ({"base_block"} if control.base_block is not None else set())
    assert {name.rpartition(".")[2] for name in quantised} == {
        "to_q",
        "to_k",
        "to_v",
        "0",
        "conv_inverted",
        "conv_point",
    }
    ways = [name for name in control.state_dict() if name.startswith(("input_block.", "controlnet_blocks."))]
    assert len(ways) == 4
    assert all(torch.equal(model.state_dict()[name], control.state_dict()[name]) for name in ways)

    error = error_of(residual_of(model), residual_of(control))
    assert 0 < error < ERRORS[8 if config.load_in_8bit else 4]

    model.save_pretrained(tmp_path / "quantised")
    saved = json.loads((tmp_path / "quantised" / "config.json").read_text())
    assert saved["residual_placement"] == control.config.residual_placement
    again = SanaControlNetModel.from_pretrained(tmp_path / "quantised", torch_dtype=torch.bfloat16, device_map="cpu")
    assert equal_states(again, model)
    assert torch.equal(residual_of(again), residual_of(model))


def test_a_controlnet_that_has_learnt_nothing_adds_nothing_when_it_is_quantised(wide_transformer, config, tmp_path):
    SanaControlNetModel.from_transformer(wide_transformer, num_layers=1).save_pretrained(tmp_path)
    model = SanaControlNetModel.from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.bfloat16, device_map="cpu"
    )
    assert not residual_of(model).any()


def test_a_quantised_transformer_cannot_be_copied(load, config):
    with pytest.raises(ValueError, match="copied before it is quantised"):
        SanaControlNetModel.from_transformer(load(quantization_config=config), num_layers=1)
