"""Pairs of models, ours and diffusers', that hold the same random weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def fill_with_noise(model: torch.nn.Module, seed: int) -> None:
    """Weights and running statistics of which none is zero, one or equal to another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.abs_().add_(0.5)


@pytest.fixture
def paired() -> Callable[..., tuple[torch.nn.Module, torch.nn.Module]]:
    """Make (ours, theirs) of one config, in eval mode; loading is strict in both directions."""

    def pair(ours: type, theirs: type, config: dict[str, Any], seed: int = 0) -> tuple[Any, Any]:
        reference, model = theirs(**config).eval(), ours(**config).eval()
        fill_with_noise(reference, seed)
        model.load_state_dict(reference.state_dict(), strict=True)
        reference.load_state_dict(model.state_dict(), strict=True)
        return model, reference

    return pair


@pytest.fixture
def difference() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Largest difference over largest value."""

    def largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0
        return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()

    return largest


@pytest.fixture
def error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Root mean square of the difference over that of the exact value."""

    def root_mean_square(found: torch.Tensor, exact: torch.Tensor) -> float:
        return ((found.double() - exact.double()).norm() / exact.double().norm()).item()

    return root_mean_square
