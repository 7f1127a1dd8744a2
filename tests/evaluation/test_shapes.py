"""Scores of drawing functions whose pictures are known."""

import numpy as np

from sana_sprint.evaluation.shapes import held_out_captions, score_drawing
from sana_sprint.shapes.captions import is_held_out, parse
from sana_sprint.shapes.renderer import render
from sana_sprint.shapes.scenes import CATEGORIES, complete


def draw_truly(captions, drawn_before):
    return [
        render(complete(parse(caption), np.random.default_rng(drawn_before + index)), 64)
        for index, caption in enumerate(captions)
    ]


def test_the_renderer_itself_scores_one():
    assert score_drawing(draw_truly, num_captions=60) == dict.fromkeys((*CATEGORIES, "overall"), 1.0)


def test_empty_pictures_score_nothing():
    scores = score_drawing(lambda captions, _: [np.full((64, 64, 3), 128, np.uint8)] * len(captions), num_captions=60)
    assert scores == dict.fromkeys((*CATEGORIES, "overall"), 0.0)


def test_held_out_captions_are_distinct_balanced_and_always_the_same():
    held_out = held_out_captions(120, seed=3)
    assert len(set(held_out.captions)) == 120
    assert all(is_held_out(caption) for caption in held_out.captions)
    assert held_out == held_out_captions(120, seed=3)
    counts = [sum(request.category == category for request in held_out.requests) for category in CATEGORIES]
    assert counts == [20] * 6
