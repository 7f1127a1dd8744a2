"""A quantised model is not stored in float8."""

import pytest
import torch


def test_a_quantised_model_is_not_stored_in_float8(load, config):
    model = load(quantization_config=config)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="is quantised.*without quantization_config"):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
