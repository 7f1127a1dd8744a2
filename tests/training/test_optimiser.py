"""The updates of one group of parameters: its rates, its clipping, its kind of moments."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from sana_sprint.training.optimiser import Optimiser, OptimiserSettings, ParameterGroup, rate_share

SETTINGS = OptimiserSettings(learning_rate=1e-2, warmup_steps=3, weight_decay=0.0)


def test_the_rate_rises_to_its_peak_and_falls_to_a_thousandth():
    assert rate_share(SETTINGS, 0, steps=12) == pytest.approx(1 / 3)
    assert rate_share(SETTINGS, 2, steps=12) == rate_share(SETTINGS, 3, steps=12) == 1
    rates = [rate_share(SETTINGS, step, steps=12) for step in range(3, 13)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1 / 1000)


def test_a_constant_rate_rises_to_its_peak_and_stays():
    constant = replace(SETTINGS, schedule="constant")
    assert [rate_share(constant, step, steps=12) for step in (0, 1, 2, 3, 11)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
        ({"kind": "adam"}, "kind must be one of adamw, adamw_8bit, got 'adam'"),
    ],
)
def test_settings_that_nothing_follows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_gradients_are_clipped_together_to_the_norm_of_the_settings():
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 4))
    optimiser = Optimiser(ParameterGroup("pair", [first, second], replace(SETTINGS, clip_norm=0.1), [second]))
    first.grad, second.grad = torch.full((3,), 2.0), torch.full((4, 4), 1.0)
    assert optimiser.clip() == pytest.approx(28**0.5)
    norm = (first.grad.square().sum() + second.grad.square().sum()).sqrt()
    assert norm == pytest.approx(0.1, rel=1e-4)
    assert first.grad[0] == pytest.approx(2 * second.grad[0, 0].item())


def test_an_update_moves_parameters_at_the_rate_of_its_step():
    weight = nn.Parameter(torch.zeros(3))
    optimiser = Optimiser(ParameterGroup("one", [weight], SETTINGS))
    weight.grad = torch.ones(3)
    optimiser.update(0, steps=12)
    # Adam's first update is its rate long.
    torch.testing.assert_close(weight.detach(), torch.full((3,), -1e-2 / 3), rtol=1e-5, atol=0)
    assert optimiser.rates(0, steps=12) == {"learning_rate": pytest.approx(1e-2 / 3)}


@pytest.mark.parametrize("shape", [(16, 8), (16, 8, 1, 1)])
def test_matrices_are_moved_alike_in_all_directions(shape):
    generator = torch.Generator().manual_seed(0)
    matrix, bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(16))
    optimiser = Optimiser(ParameterGroup("pair", [matrix, bias], SETTINGS, [matrix]))
    matrix.grad = torch.randn(shape, generator=generator)
    # One direction a hundred times stronger than the others, which AdamW would follow and Muon does not.
    matrix.grad.flatten(1).copy_(matrix.grad.flatten(1) + 100 * torch.ones(16, 1) * torch.ones(1, 8))
    bias.grad = torch.ones(16)
    optimiser.update(5, steps=12)
    strengths = torch.linalg.svdvals(matrix.detach().flatten(1))
    # Muon's five iterations bring all singular values between 0.7 and 1.2 of one value.
    assert strengths.max() < 2 * strengths.min()
    assert bias.detach().unique().numel() == 1


def trained(kind, stop_at=None):
    """A layer after 8 updates; with `stop_at`, its optimiser is replaced by one that loads its state."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)  # 8192 weights: enough for bitsandbytes to keep their moments in 8 bits
    inputs, targets = torch.randn(32, 128), torch.randn(32, 64)
    group = ParameterGroup("layer", list(layer.parameters()), replace(SETTINGS, kind=kind))
    optimiser = Optimiser(group)
    for step in range(8):
        if step == stop_at:
            state = copy.deepcopy(optimiser.state_dict())
            optimiser = Optimiser(group)
            optimiser.load_state_dict(state)
        (layer(inputs) - targets).square().mean().backward()
        optimiser.update(step, steps=8)
        optimiser.drop_gradients()
    return layer, optimiser, (layer(inputs) - targets).square().mean().item()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_an_optimiser_that_was_saved_goes_on_to_the_same_weights(kind):
    whole, _, _ = trained(kind)
    resumed, _, _ = trained(kind, stop_at=3)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_moments_in_8_bits_train_nearly_as_well():
    _, plain, loss = trained("adamw")
    _, in_8bit, loss_8bit = trained("adamw_8bit")
    assert loss_8bit == pytest.approx(loss, rel=0.02)
    sizes = [
        sum(
            value.nbytes
            for moments in each.adamw.state.values()
            for value in moments.values()
            if hasattr(value, "nbytes")
        )
        for each in (plain, in_8bit)
    ]
    assert sizes[1] < sizes[0] / 3


def test_8_bits_are_refused_where_bitsandbytes_cannot_run_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    group = ParameterGroup("one", [nn.Parameter(torch.zeros(8))], replace(SETTINGS, kind="adamw_8bit"))
    with pytest.raises(RuntimeError, match="bitsandbytes cannot run AdamW in 8 bits on cpu: choose kind='adamw'"):
        Optimiser(group)
