"""The renderer: areas, places, edges and colours of the drawn shapes."""

import numpy as np
import pytest

from sana_sprint.shapes.palette import GROUND_COLOURS, SHAPE_COLOURS
from sana_sprint.shapes.renderer import cover, coverage, render
from sana_sprint.shapes.sampler import draw_example
from sana_sprint.shapes.scenes import KINDS, Placed, Scene


def _scene(kind, radius=0.18, x=0.45, y=0.55):
    return Scene("black", (Placed(kind, "yellow", "large", x, y, radius),))


def _star_area():
    # Ten triangles between a tip, the centre and a notch.
    return 10 * 0.5 * 1.05 * (1.05 * 0.46) * np.sin(np.pi / 5)


AREAS = {
    "circle": np.pi,
    "square": 4 * 0.86**2,
    "triangle": np.sqrt(3),
    "star": _star_area(),
    "cross": 2 * (2 * 0.95) * (2 * 0.32) - (2 * 0.32) ** 2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_sums_to_the_area_of_the_shape(kind):
    radius = 50.0
    steps = np.arange(-60, 60) + 0.5
    covered = coverage(kind, steps[None, :], steps[:, None], radius)
    # Corners are rounded within a pixel: at most one pixel per corner of ten in an area of thousands.
    assert covered.sum() == pytest.approx(AREAS[kind] * radius**2, rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_fits_the_square_of_its_radius_and_reaches_its_left_and_right(kind):
    steps = np.arange(-60, 60) + 0.5
    covered = coverage(kind, steps[None, :], steps[:, None], 50.0) > 0.5
    columns, rows = (np.flatnonzero(covered.any(axis)) - 60 for axis in (0, 1))
    assert columns[0] + columns[-1] == -1  # mirrored about the centre
    assert abs(rows[0] + rows[-1] + 1) <= 1  # centred in height, within a pixel
    for places in (columns, rows):
        assert places[0] >= -50
        assert places[-1] < 50
    assert columns[-1] + 1 >= 0.86 * 50


@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_pictures_of_any_size_show_the_same_scene(size):
    rng = np.random.default_rng(5)
    for _ in range(20):
        scene = draw_example(rng).scene
        small, large = render(scene, 64).astype(float), render(scene, size).astype(float)
        assert large.shape == (size, size, 3)
        # Means over the picture differ by edge effects only: some pixels of 4,096 by part of a step.
        np.testing.assert_allclose(small.mean((0, 1)), large.mean((0, 1)), atol=0.6)


def test_edges_are_smooth_and_the_rest_is_pure():
    picture = render(_scene("circle"))
    yellow, black = SHAPE_COLOURS["yellow"], GROUND_COLOURS["black"]
    is_pure = (picture == yellow).all(-1) | (picture == black).all(-1)
    perimeter = 2 * np.pi * 0.18 * 64
    assert 0.5 * perimeter < (~is_pure).sum() < 2 * perimeter


def test_moving_a_shape_by_a_whole_pixel_moves_the_picture():
    one, other = render(_scene("star")), render(_scene("star", x=0.45 + 1 / 64, y=0.55 + 2 / 64))
    # One step: the centres are rounded to binary fractions.
    np.testing.assert_allclose(np.roll(one, (2, 1), (0, 1)).astype(int), other.astype(int), atol=1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_covered_is_where_the_picture_is_nearer_to_the_shape_than_to_the_ground(kind):
    scene = Scene("black", (*_scene(kind).shapes, Placed("circle", "yellow", "small", 0.82, 0.15, 0.11)))
    share = render(scene).astype(float)[..., 0] - GROUND_COLOURS["black"][0]
    share /= SHAPE_COLOURS["yellow"][0] - GROUND_COLOURS["black"][0]
    is_clear = np.abs(share - 0.5) > 0.01  # colours are rounded
    covered = cover(scene, 64)
    assert covered.shape == (64, 64)
    assert np.array_equal(covered[is_clear], share[is_clear] > 0.5)


def test_up_is_up():
    rows = (render(_scene("triangle", y=0.5)) != GROUND_COLOURS["black"]).any(-1).sum(1)
    widths = rows[rows > 0]
    assert widths[0] < widths[-1]


def test_a_size_too_small_for_shapes_is_refused():
    with pytest.raises(ValueError, match="at least 16 pixels, got 8"):
        render(_scene("circle"), 8)
