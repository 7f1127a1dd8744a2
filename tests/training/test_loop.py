"""The optimiser loop: resumes to the bit, follows its schedule, and refuses what cannot go on."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from sana_sprint.training.loop import Draws, OptimiserSettings, rate_share, train

SETTINGS = OptimiserSettings(
    steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=3, checkpoint_every=4, log_every=1
)


def regression(seed: int = 0):
    """A small network, and the loss of fitting a line with noise drawn per step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(draws: Draws) -> dict[str, torch.Tensor]:
        x = torch.randn(4, 3, generator=draws.generator)
        target = x.sum(1, keepdim=True) + 0.1 * float(draws.rng.standard_normal())
        return {"loss": (model(x) - target).square().mean()}

    return model, losses


def run(folder, settings=SETTINGS, stop_at=None):
    model, losses = regression()
    done = 0

    def interrupted(draws):
        nonlocal done
        if done == stop_at:
            raise KeyboardInterrupt
        done += 1
        return losses(draws)

    return model, train(model, interrupted, settings, folder, "test", use_bfloat16=False)


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_a_run_that_stopped_and_went_on_ends_with_the_same_weights(tmp_path, stop_at):
    whole_model, whole_average = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=stop_at)
    model, average = run(tmp_path / "stopped")
    assert torch.equal(parameters(model), parameters(whole_model))
    assert torch.equal(parameters(average), parameters(whole_average))


def test_training_fits_what_it_is_given(tmp_path):
    settings = replace(SETTINGS, steps=300, checkpoint_every=300)
    run(tmp_path, settings)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # The noise on the target leaves 0.01; the untrained network starts near the variance of the sum, 3.
    assert sum(losses[-20:]) / 20 < 0.1 < 1.0 < sum(losses[:5]) / 5


def test_the_average_lags_behind_the_model_and_is_not_trained(tmp_path):
    model, average = run(tmp_path)
    assert not torch.equal(parameters(model), parameters(average))
    assert not any(p.requires_grad for p in average.parameters())


def test_a_folder_of_other_settings_is_refused_by_their_names(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(learning_rate\)"):
        run(tmp_path, replace(SETTINGS, learning_rate=2e-2))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model, _ = regression()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        train(model, lambda _: {"loss": model(torch.full((1, 3), torch.nan)).sum()}, SETTINGS, tmp_path, "test")


def test_the_rate_rises_to_its_peak_and_falls_to_a_thousandth():
    assert rate_share(SETTINGS, 0) == pytest.approx(1 / 3)
    assert rate_share(SETTINGS, 2) == rate_share(SETTINGS, 3) == 1
    rates = [rate_share(SETTINGS, step) for step in range(3, 13)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1 / 1000)


def test_every_step_has_its_own_draws_and_always_the_same():
    first, again, next_step = (Draws.of_step(5, step) for step in (3, 3, 4))
    assert first.rng.random() == again.rng.random() != next_step.rng.random()
    numbers = [torch.rand(1, generator=draws.generator).item() for draws in (first, again, next_step)]
    assert numbers[0] == numbers[1] != numbers[2]
