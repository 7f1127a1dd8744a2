"""Requests and scenes: each category says what it must, and a scene shows exactly what was said."""

from itertools import combinations

import numpy as np
import pytest

from sana_sprint.shapes.scenes import (
    CATEGORIES,
    GAP,
    MARGIN,
    RELATION_SLOPE,
    SIZE_BOUNDARY,
    SIZES,
    Request,
    Thing,
    complete,
    draw_request,
)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(11)
    requests = [draw_request(rng) for _ in range(4000)]
    return [(request, complete(request, rng)) for request in requests]


def test_categories_are_balanced(drawn):
    for category in CATEGORIES:
        share = np.mean([request.category == category for request, _ in drawn])
        assert abs(share - 1 / 6) < 0.03  # five standard deviations of 4,000 draws


def test_scenes_show_exactly_what_was_said(drawn):
    for request, scene in drawn:
        wanted = [thing for thing in request.things for _ in range(thing.count)]
        assert len(scene.shapes) == len(wanted)
        for thing, shape in zip(wanted, scene.shapes, strict=True):
            assert shape.kind == thing.kind
            assert thing.colour in (None, shape.colour)
            assert thing.size in (None, shape.size)
        assert request.ground in (None, scene.ground)


def test_shapes_of_a_counted_thing_look_alike(drawn):
    counted = [scene.shapes for request, scene in drawn if request.category == "counting"]
    assert {len(shapes) for shapes in counted} == {1, 2, 3}
    assert all(len({(shape.colour, shape.size) for shape in shapes}) == 1 for shapes in counted)


def test_relations_hold_clearly(drawn):
    positions = [(request, scene) for request, scene in drawn if request.category == "position"]
    assert {request.relation for request, _ in positions} == {"left of", "right of", "above", "below"}
    for request, scene in positions:
        first, second = scene.shapes
        right, down = second.x - first.x, second.y - first.y
        along = {"left of": right, "right of": -right, "above": down, "below": -down}[request.relation]
        across = down if request.relation in ("left of", "right of") else right
        assert along >= first.radius + second.radius + GAP - 1e-9
        assert abs(across) <= RELATION_SLOPE * along + 1e-9


def test_shapes_neither_touch_nor_leave_the_picture(drawn):
    for _, scene in drawn:
        for shape in scene.shapes:
            for centre in (shape.x, shape.y):
                assert shape.radius + MARGIN - 1e-9 <= centre <= 1 - shape.radius - MARGIN + 1e-9
        for one, other in combinations(scene.shapes, 2):
            apart = max(abs(one.x - other.x), abs(one.y - other.y))
            assert apart >= one.radius + other.radius + GAP - 1e-9


def test_sizes_are_disjoint_ranges_of_the_radius(drawn):
    assert SIZES["small"][1] < SIZE_BOUNDARY < SIZES["large"][0]
    for _, scene in drawn:
        for shape in scene.shapes:
            low, high = SIZES[shape.size]
            assert low <= shape.radius <= high


def test_each_category_says_what_it_is_about(drawn):
    for request, _ in drawn:
        first, *others = request.things
        coloured = sum(thing.colour is not None for thing in request.things)
        if request.category in ("single_object", "colours"):
            assert (len(others), first.count) == (0, 1)
            assert coloured == (request.category == "colours")
        elif request.category == "counting":
            assert not others
        elif request.category == "colour_attribution":
            assert coloured == 2
            assert first.colour != others[0].colour
        elif request.category == "two_objects":
            assert coloured < 2
            assert first.kind != others[0].kind
        assert (request.relation is not None) == (request.category == "position")


def test_two_things_can_always_be_told_apart(drawn):
    pairs = [request.things for request, _ in drawn if len(request.things) == 2]
    assert all(one.kind != other.kind or None not in (one.colour, other.colour) for one, other in pairs)
    assert all((one.kind, one.colour) != (other.kind, other.colour) for one, other in pairs)
    assert any(one.kind == other.kind for one, other in pairs)


def test_the_same_seed_draws_the_same_scenes():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [complete(draw_request(rng), rng) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_what_the_world_cannot_show_is_refused():
    with pytest.raises(ValueError, match="colour must be one of None, red.*got 'gray'"):
        Thing("circle", "gray")
    with pytest.raises(ValueError, match="category must be one of single_object.*got 'colour'"):
        draw_request(np.random.default_rng(0), "colour")
    with pytest.raises(ValueError, match="relation must be one of None"):
        Request("position", (Thing("circle"),), relation="above")
    with pytest.raises(ValueError, match=r"got counts \[2, 1\]"):
        Request("two_objects", (Thing("circle", count=2), Thing("star")))
