"""The judge: right about every drawn scene, about pictures of other scenes, and about spoiled pictures."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from sana_sprint.shapes.judge import find_colours, find_shapes, judge, score
from sana_sprint.shapes.palette import GROUND_COLOURS, SHAPE_COLOURS
from sana_sprint.shapes.renderer import coverage, render
from sana_sprint.shapes.sampler import draw_example
from sana_sprint.shapes.scenes import CATEGORIES, COLOURS, GROUNDS, KINDS, Placed, Request, Scene, Thing, complete


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(81)
    return [draw_example(rng, category=category) for _ in range(300) for category in CATEGORIES]


@pytest.fixture(scope="module")
def pictures(examples):
    return [render(example.scene) for example in examples]


def _fulfils(scene, request):
    """Whether a scene shows what a request says, from the scene's own numbers."""
    wanted = [thing for thing in request.things for _ in range(thing.count)]
    if len(wanted) != len(scene.shapes) or request.ground not in (None, scene.ground):
        return False
    for order in permutations(scene.shapes):
        fits = all(
            thing.kind == shape.kind and thing.colour in (None, shape.colour) and thing.size in (None, shape.size)
            for thing, shape in zip(wanted, order, strict=True)
        )
        if fits and request.relation is not None:
            right, down = order[1].x - order[0].x, order[1].y - order[0].y
            fits = {
                "left of": right > abs(down),
                "right of": -right > abs(down),
                "above": down > abs(right),
                "below": -down > abs(right),
            }[request.relation]
        if fits:
            return True
    return False


def _share_accepted(pictures, examples):
    return np.mean([judge(picture, each.request).correct for picture, each in zip(pictures, examples, strict=True)])


def test_every_rendered_scene_of_64_pixels_is_accepted(examples, pictures):
    assert len(examples) == 1800
    refused = [
        (example.caption, judge(picture, example.request).reasons)
        for example, picture in zip(examples, pictures, strict=True)
        if not judge(picture, example.request).correct
    ]
    assert refused == []


def test_every_rendered_scene_of_128_pixels_is_accepted(examples):
    assert _share_accepted([render(each.scene, 128) for each in examples[:300]], examples[:300]) == 1.0


def test_what_is_seen_is_what_was_drawn(examples, pictures):
    for example, picture in zip(examples[:200], pictures[:200], strict=True):
        seen = find_shapes(picture)
        assert (seen.ground, seen.num_blobs) == (example.scene.ground, 0)
        by_place = sorted(seen.shapes, key=lambda shape: (shape.x, shape.y))
        for found, drawn in zip(by_place, sorted(example.scene.shapes, key=lambda s: (s.x, s.y)), strict=True):
            assert (found.kind, found.colour, found.size) == (drawn.kind, drawn.colour, drawn.size)
            # Half a pixel of 64: edges are smoothed over one.
            np.testing.assert_allclose(
                (found.x, found.y, found.radius), (drawn.x, drawn.y, drawn.radius), atol=0.5 / 64
            )


def test_pictures_of_another_scene_of_the_category_are_rejected(examples, pictures):
    # The order of categories repeats every six, so a shift by six meets the hardest: the same category.
    others = [
        (picture, example.request)
        for picture, shown, example in zip(pictures[6:], examples[6:], examples, strict=False)
        if not _fulfils(shown.scene, example.request)
    ]
    assert len(others) > 1000
    rejected = [not judge(picture, request).correct for picture, request in others[:1000]]
    assert np.mean(rejected) >= 0.999


def _other(value, options):
    return options[(options.index(value) + 1) % len(options)]


def _spoiled(scene):
    """Scenes that differ from one in a single respect, each with its name."""
    first, *rest = scene.shapes
    yield "kind", replace(scene, shapes=(replace(first, kind=_other(first.kind, KINDS)), *rest))
    yield "colour", replace(scene, shapes=(replace(first, colour=_other(first.colour, COLOURS)), *rest))
    if first.size == "large":
        yield "size", replace(scene, shapes=(replace(first, size="small", radius=0.11), *rest))
    yield "ground", replace(scene, ground=_other(scene.ground, GROUNDS))
    yield "missing", replace(scene, shapes=tuple(rest))
    if rest:
        yield "turned", replace(scene, shapes=tuple(replace(s, x=1 - s.x, y=1 - s.y) for s in scene.shapes))


def test_a_picture_wrong_in_one_respect_is_rejected(examples):
    tried = {}
    for example in examples[:300]:
        for name, scene in _spoiled(example.scene):
            if not _fulfils(scene, example.request):
                tried.setdefault(name, []).append(judge(render(scene), example.request).correct)
    assert set(tried) == {"kind", "colour", "size", "ground", "missing", "turned"}
    for name, accepted in tried.items():
        assert len(accepted) > 20, name
        assert not any(accepted), name


def test_a_picture_with_one_shape_too_many_is_rejected():
    request = Request("single_object", (Thing("star"),))
    star = Placed("star", "blue", "small", 0.25, 0.3, 0.11)
    extra = Placed("star", "blue", "small", 0.7, 0.7, 0.11)
    assert judge(render(Scene("white", (star,))), request).correct
    assert judge(render(Scene("white", (star, extra))), request).reasons == ("wanted 1 shape(s), found 2",)


def _blur(picture, sigma):
    reach = int(3 * sigma) + 1
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    blurred = np.pad(picture.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    for axis in (0, 1):
        count = blurred.shape[axis] - 2 * reach
        shifted = [np.take(blurred, range(start, start + count), axis) for start in range(2 * reach + 1)]
        blurred = np.tensordot(weights / weights.sum(), np.array(shifted), axes=1)
    return np.rint(blurred).astype(np.uint8)


def _wobble(picture, amplitude, rng):
    """Pixels displaced by a smooth random field of so many pixels (standard deviation at its knots, 8 pixels apart)."""
    size = picture.shape[0]
    knots, places = np.linspace(0, size - 1, size // 8 + 1), np.arange(size)
    field = rng.normal(0, amplitude, (2, len(knots), len(knots)))
    rows = np.array([[np.interp(places, knots, line) for line in plane] for plane in field])
    dense = np.array([[np.interp(places, knots, line) for line in plane.T] for plane in rows])
    y, x = np.mgrid[:size, :size]
    sources = np.clip(np.rint([y + dense[0].T, x + dense[1].T]), 0, size - 1).astype(int)
    return picture[sources[0], sources[1]]


def _clip(values):
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def test_softer_edges_noise_and_drifting_colours_of_generated_pictures_are_tolerated(examples, pictures):
    rng = np.random.default_rng(91)
    some = examples[:180]
    spoilers = {
        "blur of 0.7 pixels": lambda picture: _blur(picture, 0.7),
        "noise of 8 steps": lambda picture: _clip(picture + rng.normal(0, 8, picture.shape)),
        "drift of 15 steps": lambda picture: _clip(picture + rng.uniform(-15, 15, 3)),
    }
    for name, spoil in spoilers.items():
        assert _share_accepted([spoil(picture) for picture in pictures[:180]], some) >= 0.99, name


def test_stray_pixels_are_tolerated():
    picture = render(Scene("white", (Placed("circle", "red", "large", 0.5, 0.5, 0.18),)))
    picture[[2, 9, 60, 30], [5, 50, 3, 58]] = SHAPE_COLOURS["blue"]
    assert judge(picture, Request("single_object", (Thing("circle"),))).correct


def test_spoiled_pictures_are_rejected(examples, pictures):
    rng = np.random.default_rng(101)
    some = examples[:180]
    spoilers = {
        "blur of 4 pixels": lambda picture: _blur(picture, 4),
        "noise of 40 steps": lambda picture: _clip(picture + rng.normal(0, 40, picture.shape)),
        "noise alone": lambda picture: rng.integers(0, 256, picture.shape, dtype=np.uint8),
        "outlines pulled about by 4 pixels": lambda picture: _wobble(picture, 4, rng),
        "nothing but the ground": lambda picture: np.broadcast_to(picture[:1, :1], picture.shape),
        "pixels shuffled": lambda picture: rng.permuted(picture.reshape(-1, 3), axis=0).reshape(picture.shape),
        "the middle stretched to twice its height": lambda picture: picture[16:48].repeat(2, axis=0),
    }
    for name, spoil in spoilers.items():
        # Three in a hundred: of large circles a blur leaves circles.
        assert _share_accepted([spoil(picture) for picture in pictures[:180]], some) <= 0.03, name


def _paint(inside, colour="red", ground="white", size=64):
    picture = np.empty((size, size, 3), dtype=np.uint8)
    picture[:] = GROUND_COLOURS[ground]
    picture[inside] = SHAPE_COLOURS[colour]
    return picture


Y, X = (axis - 31.5 for axis in np.mgrid[:64, :64])
NO_SHAPES = {
    "diamond": np.abs(X) + np.abs(Y) < 14,
    "half disc": (np.hypot(X, Y) < 14) & (Y < 0),
    "ring": (np.hypot(X, Y) < 13) & (np.hypot(X, Y) > 5),
    "ellipse": np.hypot(X / 1.4, Y) < 9,
    "bar": (np.abs(X) < 13) & (np.abs(Y) < 7),
    "L": (np.abs(X) < 11) & (np.abs(Y) < 11) & ((X < -3) | (Y > 3)),
    "upside down triangle": coverage("triangle", X, -Y, 12.0) > 0.5,
    "upside down star": coverage("star", X, -Y, 12.0) > 0.5,
    "saltire": coverage("cross", (X + Y) / np.sqrt(2), (X - Y) / np.sqrt(2), 12.0) > 0.5,
    "cushion between circle and square": np.abs(X) ** 3.2 + np.abs(Y) ** 3.2 < 11**3.2,
    "two circles run together": (np.hypot(X - 7, Y) < 9) | (np.hypot(X + 7, Y) < 9),
    "speck": np.hypot(X, Y) < 3,
    "huge circle": np.hypot(X, Y) < 20,
}


@pytest.mark.parametrize("name", NO_SHAPES)
def test_blobs_are_no_shapes(name):
    assert find_shapes(_paint(NO_SHAPES[name])).shapes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_painted_without_smooth_edges_are_still_shapes(kind):
    (seen,) = find_shapes(_paint(coverage(kind, X, Y, 12.0) > 0.5)).shapes
    assert (seen.kind, seen.colour, seen.size) == (kind, "red", "large")


def test_a_shape_in_two_colours_is_no_shape():
    picture = _paint(np.hypot(X, Y) < 12)
    picture[:32][np.hypot(X, Y)[:32] < 12] = SHAPE_COLOURS["blue"]
    seen = find_shapes(picture)
    assert (seen.shapes, seen.num_blobs) == ((), 2)


def test_shapes_of_two_colours_may_touch():
    picture = _paint(np.hypot(X + 12, Y) < 11)
    picture[np.hypot(X - 11, Y) < 11] = SHAPE_COLOURS["blue"]
    assert [shape.colour for shape in sorted(find_shapes(picture).shapes, key=lambda s: s.x)] == ["red", "blue"]


def test_a_ground_that_is_no_ground_colour_is_rejected():
    picture = _paint(np.hypot(X, Y) < 12, colour="blue")
    picture[(picture == GROUND_COLOURS["white"]).all(-1)] = SHAPE_COLOURS["green"]
    verdict = judge(picture, Request("single_object", (Thing("circle"),)))
    assert verdict.reasons == ("the border shows no ground colour",)


def test_a_ground_in_two_halves_is_rejected():
    picture = render(Scene("white", (Placed("circle", "red", "large", 0.25, 0.5, 0.18),)))
    picture[:, 40:] = GROUND_COLOURS["grey"]
    assert find_shapes(picture).ground is None


@pytest.mark.parametrize(("down", "accepted"), [(0.15, True), (0.35, False)])
def test_a_relation_must_hold_more_than_the_one_across_it(down, accepted):
    shapes = (Placed("star", "red", "small", 0.3, 0.3, 0.11), Placed("cross", "blue", "small", 0.55, 0.3 + down, 0.11))
    request = Request("position", (Thing("star"), Thing("cross")), "left of")
    assert judge(render(Scene("white", shapes)), request).correct == accepted


def test_reasons_name_what_was_wanted_and_what_was_found():
    picture = render(Scene("white", (Placed("circle", "red", "large", 0.5, 0.5, 0.18),)))
    request = Request("colours", (Thing("star", "red", "small"),), ground="black")
    assert judge(picture, request).reasons == (
        "wanted a black ground, found white",
        "wanted star, found circle",
        "wanted small, found large",
    )


def test_a_mirrored_relation_is_named():
    rng = np.random.default_rng(111)
    request = Request("position", (Thing("circle", "red"), Thing("square", "blue")), "left of")
    assert judge(render(complete(request, rng))[:, ::-1], request).reasons == ("the first is not left of the second",)


def test_the_overall_score_is_the_mean_over_categories():
    rng = np.random.default_rng(121)
    drawn = [draw_example(rng, category=category) for category in ("counting", "counting", "counting", "position")]
    shown = [render(each.scene) for each in drawn]
    shown[0] = shown[3]
    scores = score(shown, [each.request for each in drawn])
    assert scores == pytest.approx({"counting": 2 / 3, "position": 1.0, "overall": 5 / 6})


def test_colours_are_those_of_the_scene_whatever_the_outlines(examples, pictures):
    for example, picture in zip(examples[:120], pictures):
        wanted = {shape.colour for shape in example.scene.shapes}
        for shown in (picture, picture[::-1]):
            found = find_colours(shown)
            assert found.ground == example.scene.ground
            assert found.colours == wanted
            assert found.foreground.shape == picture.shape[:2]
    # A bar is no shape, and has a colour.
    picture = np.full((64, 64, 3), GROUND_COLOURS["grey"], np.uint8)
    picture[20:30, 8:56] = SHAPE_COLOURS["pink"]
    found = find_colours(picture)
    assert (found.ground, found.colours) == ("grey", {"pink"})
    assert np.argwhere(found.foreground).min(0).tolist() == [20, 8]
    assert found.foreground.sum() == 10 * 48


def test_score_and_judge_refuse_what_they_cannot_read():
    request = Request("single_object", (Thing("star"),))
    with pytest.raises(ValueError, match="got 0 pictures and 0 requests"):
        score([], [])
    with pytest.raises(ValueError, match="got 1 pictures and 2 requests"):
        score([np.zeros((64, 64, 3), np.uint8)], [request, request])
    with pytest.raises(ValueError, match=r"uint8 of shape \(S, S, 3\), got float32"):
        judge(np.zeros((64, 64, 3), np.float32), request)
    with pytest.raises(ValueError, match=r"got uint8 of shape \(64, 32, 3\)"):
        judge(np.zeros((64, 32, 3), np.uint8), request)
