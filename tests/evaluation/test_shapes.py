"""Scores of drawing functions whose pictures are known."""

import numpy as np
import pytest

from sana_sprint.evaluation.shapes import DistanceToRenderings, held_out_captions, score_drawing
from sana_sprint.shapes.captions import is_held_out, parse
from sana_sprint.shapes.judge import score
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


def test_more_captions_than_there_are_end_with_the_category_that_has_no_more(monkeypatch):
    monkeypatch.setattr("sana_sprint.evaluation.shapes._MOST_IN_VAIN", 3)
    with pytest.raises(ValueError, match="2000 captions are too many: of category single_object there are hardly more"):
        held_out_captions(2000, seed=3)


def test_held_out_captions_are_distinct_balanced_and_always_the_same():
    held_out = held_out_captions(120, seed=3)
    assert len(set(held_out.captions)) == 120
    assert all(is_held_out(caption) for caption in held_out.captions)
    assert held_out == held_out_captions(120, seed=3)
    counts = [sum(request.category == category for request in held_out.requests) for category in CATEGORIES]
    assert counts == [20] * 6


def colours_and_contrast(pictures):
    """Features (B, 6) that need no network."""
    return np.concatenate([pictures.mean(axis=(1, 2)), pictures.std(axis=(1, 2))], axis=1) / 255


def test_pictures_come_in_the_order_of_their_captions_whatever_the_batches():
    held_out = held_out_captions(12, seed=1)
    batches = []

    def draw(captions, drawn_before):
        batches.append((drawn_before, len(captions)))
        return [np.full((1, 1, 3), held_out.captions.index(caption), np.uint8) for caption in captions]

    assert [int(picture[0, 0, 0]) for picture in held_out.drawn(draw, batch_size=5)] == list(range(12))
    assert batches == [(0, 5), (5, 5), (10, 2)]


def test_renderings_are_of_the_captions_in_turn_and_of_another_scene_each_time():
    held_out = held_out_captions(6, seed=2)
    rendered = list(held_out.rendered(32, times=2, seed=0))
    assert len(rendered) == 12
    assert all(picture.shape == (32, 32, 3) for picture in rendered)
    assert not any((one == other).all() for one, other in zip(rendered[:6], rendered[6:]))
    assert score(list(held_out.rendered(64, times=1, seed=0)), held_out.requests)["overall"] == 1.0


def test_true_pictures_are_nearer_to_the_renderings_than_pale_ones_and_those_than_none():
    held_out = held_out_captions(60, seed=4)
    distance = DistanceToRenderings(held_out, colours_and_contrast)
    true = held_out.drawn(draw_truly)
    pale = [(picture // 2 + 64).astype(np.uint8) for picture in true]
    empty = [np.full((64, 64, 3), 128, np.uint8)] * 60
    assert distance.num_references == 240
    # Of sixty and 240 pictures: the noise of the means alone is about 0.002.
    assert distance(true) < 0.02
    assert distance(true) < distance(pale) / 2 < distance(empty) / 2


def test_the_distance_is_the_same_at_every_call():
    held_out = held_out_captions(12, seed=5)
    pictures = held_out.drawn(draw_truly)
    distance = DistanceToRenderings(held_out, colours_and_contrast)
    first = distance(pictures)
    distance([255 - picture for picture in pictures])
    assert distance(pictures) == first == DistanceToRenderings(held_out, colours_and_contrast)(pictures)
