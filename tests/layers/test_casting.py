"""Casting a model is silent, unless there is something to say (defect C1)."""

import logging
from collections.abc import Iterator

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin

from sana_sprint.layers.casting import QuietCastMixin


class Plain(QuietCastMixin):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(2)


class Delicate(Plain):
    _keep_in_fp32_modules = ["norm"]


LOGGER = logging.getLogger(ModelMixin.__module__)


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What diffusers says about models, however its logging is set up."""
    recorder, filters = Recorder(), list(LOGGER.filters)
    LOGGER.addHandler(recorder)
    yield recorder.messages
    LOGGER.removeHandler(recorder)
    assert LOGGER.filters == filters


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: model.to(dtype=torch.bfloat16),
        lambda model: model.to(device="cpu", dtype=torch.bfloat16, non_blocking=True),
    ],
)
def test_c1_a_cast_that_concerns_no_module_says_nothing(said, cast):
    model = Plain()
    assert cast(model) is model
    assert model.norm.weight.dtype == torch.bfloat16
    assert said == []


def test_c1_a_cast_that_concerns_a_module_still_warns(said):
    Delicate().to(torch.bfloat16)
    assert ["should be kept in float32: ['norm']" in message for message in said] == [True]


def test_c1_other_models_are_left_alone(said):
    class Theirs(ModelMixin):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(2)

    Plain().to(torch.bfloat16)
    Theirs().to(torch.bfloat16)
    assert ["Theirs" in message for message in said] == [True]


def test_a_quantised_model_still_refuses_to_be_cast(said):
    model = Plain()
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        model.to(torch.bfloat16)
