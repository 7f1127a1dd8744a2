"""The random numbers of a step: the same whoever draws them, and others at every step."""

import pytest
import torch

from sana_sprint.training.draws import Draws

DRAWN = {
    "normal": lambda draws: draws.normal((2, 3)),
    "uniform": lambda draws: draws.uniform((4,)),
    "integers": lambda draws: draws.integers(1000),
    "choice": lambda draws: draws.choice([4.0, 4.5, 5.0]),
    "all of them": lambda draws: torch.stack([draws.normal(), draws.uniform(), draws.integers(9), draws.normal()], 1),
}


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_the_parts_of_a_step_draw_what_the_whole_draws(draw, parts):
    whole = draw(Draws.of_step(7, 11, 6))
    cut = [draw(Draws.of_step(7, 11, 6 // parts, part, parts)) for part in range(parts)]
    assert len(whole) == 6
    assert torch.equal(torch.cat(cut), whole)


def test_a_generator_of_the_step_is_the_same_in_every_part():
    numbers = {Draws.of_step(7, 11, 2, part, 3).rng.random() for part in range(3)}
    assert len(numbers) == 1


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_every_seed_and_every_step_has_its_own_draws_and_always_the_same(draw):
    first, again, next_step, next_seed = (draw(Draws.of_step(*place, 64)) for place in ((5, 3), (5, 3), (5, 4), (6, 3)))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, next_seed)


def test_examples_do_not_draw_alike():
    assert len(Draws.of_step(0, 0, 1000).normal().unique()) == 1000


def test_draws_are_distributed_as_they_are_named():
    draws = Draws.of_step(0, 0, 10, device="cpu")
    # Four standard deviations of the mean of 100,000 numbers.
    normal, uniform = draws.normal((10_000,)), draws.uniform((10_000,))
    assert normal.mean().abs() < 0.013
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert uniform.mean() == pytest.approx(0.5, abs=0.004)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert {normal.dtype, uniform.dtype, draws.choice([1, 2]).dtype} == {torch.float32}
    many = Draws.of_step(0, 0, 300)
    assert many.integers(3).unique().tolist() == [0, 1, 2]
    assert many.choice([4.0, 4.5, 5.0]).unique().tolist() == [4.0, 4.5, 5.0]
