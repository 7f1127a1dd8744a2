"""Examples: training and held-out captions never mix."""

import numpy as np
import pytest

from sana_sprint.shapes.captions import is_held_out, parse
from sana_sprint.shapes.sampler import draw_example
from sana_sprint.shapes.scenes import CATEGORIES


def _normalise(caption):
    return caption.lower().replace(",", "").rstrip(".")


def test_held_out_and_training_captions_are_disjoint():
    rng = np.random.default_rng(1)
    trained = {_normalise(draw_example(rng).caption) for _ in range(5000)}
    held_out = {_normalise(draw_example(rng, held_out=True).caption) for _ in range(500)}
    assert len(held_out) > 250
    assert not trained & held_out
    assert not any(is_held_out(caption) for caption in trained)


@pytest.mark.parametrize("held_out", [False, True])
def test_examples_are_balanced_and_say_what_they_draw(held_out):
    rng = np.random.default_rng(2)
    examples = [draw_example(rng, held_out) for _ in range(900)]
    for category in CATEGORIES:
        count = sum(example.request.category == category for example in examples)
        assert abs(count - 150) < 56  # five standard deviations
    for example in examples:
        assert parse(example.caption) == example.request
        assert len(example.scene.shapes) == example.request.num_shapes


def test_a_category_can_be_asked_for():
    rng = np.random.default_rng(3)
    assert {draw_example(rng, category="counting").request.category for _ in range(20)} == {"counting"}


def test_the_same_seed_draws_the_same_examples():
    one, other = np.random.default_rng(4), np.random.default_rng(4)
    assert [draw_example(one) for _ in range(30)] == [draw_example(other) for _ in range(30)]
