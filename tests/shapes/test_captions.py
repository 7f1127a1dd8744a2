"""Captions: every wording is read back, and the held-out ones are a matter of what is said."""

import re

import numpy as np
import pytest

from sana_sprint.shapes.captions import (
    VOCABULARY,
    are_words_held_out,
    describe,
    describe_colours,
    is_held_out,
    parse,
    unknown_words,
)
from sana_sprint.shapes.scenes import (
    CATEGORIES,
    COLOURS,
    GROUNDS,
    KINDS,
    Placed,
    Request,
    Scene,
    Thing,
    complete,
    draw_request,
)

RED_CIRCLE, BLUE_SQUARE = Thing("circle", "red"), Thing("square", "blue")


@pytest.fixture(scope="module")
def described():
    rng = np.random.default_rng(21)
    requests = [draw_request(rng) for _ in range(6000)]
    return [(request, describe(request, rng)) for request in requests]


def test_parse_is_the_inverse_of_describe(described):
    for request, caption in described:
        assert parse(caption) == request, caption


def test_captions_use_the_whole_vocabulary_and_nothing_else(described):
    used = {word.strip(",.").lower() for _, caption in described for word in caption.split()}
    assert used == VOCABULARY


@pytest.mark.parametrize(
    ("caption", "request_meant"),
    [
        ("A RED circle to the left of a blue square!", Request("position", (RED_CIRCLE, BLUE_SQUARE), "left of")),
        ("red circle on the left, blue square on the right", Request("position", (RED_CIRCLE, BLUE_SQUARE), "left of")),
        ("red circle at the bottom, blue square at the top", Request("position", (RED_CIRCLE, BLUE_SQUARE), "below")),
        ("a blue square, a red circle", Request("colour_attribution", (BLUE_SQUARE, RED_CIRCLE))),
        ("a circle and a blue square", Request("two_objects", (Thing("circle"), BLUE_SQUARE))),
        ("a red circle and a red star", Request("two_objects", (RED_CIRCLE, Thing("star", "red")))),
        ("a pair of big stars", Request("counting", (Thing("star", size="large", count=2),))),
        ("one star", Request("counting", (Thing("star"),))),
        ("a star", Request("single_object", (Thing("star"),))),
        ("blue large square", Request("colours", (Thing("square", "blue", "large"),))),
        ("on a gray background, the photo of a star", Request("single_object", (Thing("star"),), ground="grey")),
        (
            "a tiny violet disc over a plus sign on black",
            Request("position", (Thing("circle", "purple", "small"), Thing("cross")), "above", "black"),
        ),
    ],
)
def test_what_a_person_would_write_is_read(caption, request_meant):
    assert parse(caption) == request_meant


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a dog left of a circle", "unknown words.*'dog'.*known words:.*circle"),
        ("a white circle", "did not understand 'a white'.*grounds white"),
        ("a circle on a white square", "did not understand 'on a white'"),
        ("a circle on a red background", "did not understand 'on a red background'.*grounds white"),
        ("a circle on white on a black ground", "one ground at most, found black and white"),
        ("a red blue circle", "more than one colour"),
        ("circles", "'two' or 'three'"),
        ("two circle", "'two' or 'three'"),
        ("two circles and a star", "got counts"),
        ("a circle, a star and a square", "one or two things wanted, found 3"),
        ("a circle on the left", "did not understand 'on the left'"),
        ("on the left a circle", "did not understand 'on the left'"),
        ("", "found 0"),
    ],
)
def test_what_the_world_cannot_show_is_refused_with_the_reason(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(caption)


def test_unknown_words_come_once_in_order_whatever_the_case():
    assert unknown_words("A Dog, a RED circle; a cat and a dog!") == ["dog", "cat"]
    assert unknown_words("a café") == ["café"]


def test_the_vocabulary_names_every_kind_and_colour():
    assert {*KINDS, *COLOURS, *GROUNDS} <= VOCABULARY


@pytest.mark.parametrize("category", CATEGORIES)
def test_about_three_captions_of_a_hundred_are_held_out_in_every_category(category):
    rng = np.random.default_rng(31)
    held_out = [is_held_out(describe(draw_request(rng, category), rng)) for _ in range(3000)]
    # Captions repeat (there are ten bare pairs of kinds), so the share strays more than that of 3,000 coins.
    assert 0.005 < np.mean(held_out) < 0.08


@pytest.mark.parametrize("category", ["counting", "two_objects", "position", "colour_attribution"])
def test_held_out_does_not_depend_on_the_wording_of_rich_requests(category):
    rng = np.random.default_rng(41)
    for _ in range(100):
        request = draw_request(rng, category)
        assert len({is_held_out(describe(request, rng)) for _ in range(5)}) == 1


def test_held_out_combinations_are_held_out_in_every_order_size_and_ground():
    rng = np.random.default_rng(51)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    found = 0
    for _ in range(2000):
        request = draw_request(rng, ("position", "colour_attribution")[int(rng.integers(2))])
        first, second = (Thing(thing.kind, thing.colour) for thing in request.things)
        plain = Request(request.category, (first, second), request.relation)
        turned = Request(request.category, (second, first), opposite[request.relation])
        states = {is_held_out(describe(each, rng)) for each in (request, plain, turned)}
        assert len(states) == 1
        found += states == {True}
    assert found > 20  # both answers were seen


def test_every_simple_content_keeps_captions_in_training():
    rng = np.random.default_rng(61)
    for kind in KINDS:
        for colour in COLOURS:
            request = Request("colours", (Thing(kind, colour),))
            assert not all(is_held_out(describe(request, rng)) for _ in range(12))


# Recorded: weights were trained under this rule, and a change would have let held-out captions into training.
HELD_OUT = (
    "A drawing of a cross on a brown background.",
    "an image of a triangle",
    "a large square and a cyan triangle against a black background",
    "a picture of a large star and a green circle",
    "a drawing of 3 purple squares",
    "three cyan crosses",
    "a red star on a grey ground",
    "little purple star",
    "a square below a small star",
    "blue square underneath cyan square",
    "red cross, orange circle, grey background",
    "a photo of a red star and a yellow triangle",
)
TRAINED_ON = (
    "a square",
    "a small cross",
    "a square beside a triangle",
    "a square with a circle",
    "three squares on a brown background",
    "two large stars on a brown background",
    "cyan square",
    "a large orange cross on a grey background",
    "a star at the bottom and a triangle at the top",
    "a purple square under a circle",
    "a green triangle and a red cross",
    "Red circle, yellow circle, black ground.",
)


def test_the_held_out_rule_is_stable_and_blind_to_case_and_punctuation():
    for caption in HELD_OUT:
        assert is_held_out(caption), caption
        assert is_held_out(caption.upper() + "!"), caption
    assert not any(is_held_out(caption) for caption in TRAINED_ON)


def test_captions_of_colours_name_the_colours_and_the_ground_and_nothing_else():
    rng = np.random.default_rng(4)
    nouns = {"circle", "disc", "square", "triangle", "star", "cross", "plus", "sign"}
    for _ in range(300):
        scene = complete(draw_request(rng), rng)
        caption = describe_colours(scene, rng)
        words = re.findall("[a-z]+", caption)
        synonyms = {"violet": "purple", "turquoise": "cyan", "gray": "grey"}
        named = [synonyms.get(word, word) for word in words]
        # Each once, in an order that is tested below.
        colours = {shape.colour for shape in scene.shapes}
        assert sorted(word for word in named if word in COLOURS) == sorted(colours)
        assert [word for word in named if word in GROUNDS] == [scene.ground]
        assert not unknown_words(caption)
        assert not nouns & set(words)
        assert not set(words) & {"left", "right", "above", "below", "two", "three", "small", "large"}


@pytest.mark.parametrize(
    ("places", "order"),
    [
        ({"red": (0.7, 0.5), "blue": (0.3, 0.4)}, ["blue", "red"]),
        # Hardly further left, but well above.
        ({"red": (0.49, 0.8), "blue": (0.5, 0.2)}, ["blue", "red"]),
        ({"red": (0.5, 0.2), "blue": (0.49, 0.8)}, ["red", "blue"]),
        ({"red": (0.2, 0.5), "green": (0.8, 0.4), "blue": (0.5, 0.7)}, ["red", "blue", "green"]),
    ],
)
def test_captions_of_colours_go_along_the_line_of_the_shapes(places, order):
    shapes = tuple(Placed("circle", colour, "large", x, y, 0.1) for colour, (x, y) in places.items())
    words = re.findall("[a-z]+", describe_colours(Scene("white", shapes), np.random.default_rng(6)))
    assert [word for word in words if word in COLOURS] == order


def test_one_caption_of_colours_in_32_is_held_out_and_every_content_is_trained_on():
    rng = np.random.default_rng(5)
    scenes = [complete(draw_request(rng, "single_object"), rng) for _ in range(60)]
    captions = [[describe_colours(scene, rng) for _ in range(100)] for scene in scenes]
    shares = [np.mean([are_words_held_out(caption) for caption in each]) for each in captions]
    assert max(shares) < 1
    assert 0 < np.mean(shares) < 0.1
    assert are_words_held_out("Red on White!") == are_words_held_out("red on white")
