"""Requests to answers: everything that a picture depends on, and nothing else."""

import numpy as np
import pytest

from sana_sprint.shapes.captions import describe, parse
from sana_sprint.shapes.questions import NUM_ANSWERS, answers
from sana_sprint.shapes.scenes import CATEGORIES, Request, Thing, draw_request


def test_every_answer_is_among_those_of_its_question():
    rng = np.random.default_rng(0)
    found = np.array([answers(draw_request(rng)) for _ in range(3000)])
    assert found.min() == 0
    assert tuple(found.max(axis=0) + 1)[:2] == NUM_ANSWERS[:2]
    assert (found.max(axis=0) < NUM_ANSWERS).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_two_wordings_of_a_request_have_the_same_answers(category):
    rng = np.random.default_rng(1)
    for _ in range(50):
        request = draw_request(rng, category)
        assert answers(parse(describe(request, rng))) == answers(request)


@pytest.mark.parametrize(("relation", "reverse"), [("left of", "right of"), ("above", "below")])
def test_a_relation_and_its_reverse_are_the_same_picture(relation, reverse):
    one, other = Thing("circle", "red"), Thing("star", "blue", "small")
    assert answers(Request("position", (one, other), relation)) == answers(Request("position", (other, one), reverse))
    assert answers(Request("position", (one, other), relation)) != answers(Request("position", (other, one), relation))


def test_things_that_differ_have_different_answers():
    requests = [
        Request("counting", (thing,))
        for thing in (
            Thing("circle"),
            Thing("star"),
            Thing("circle", "red"),
            Thing("circle", size="small"),
            Thing("circle", count=2),
        )
    ]
    assert len({answers(request) for request in requests}) == len(requests)
