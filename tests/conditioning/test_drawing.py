"""Soft edges and scribbles of drawings: where their lines are, how broad, whatever their colours."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sana_sprint.conditioning.drawing import ridges, scribble, soft_edges

pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")

BOTH = pytest.mark.parametrize("function", [soft_edges, scribble])
CIRCLE = (200, 256, 120)  # x, y and radius, on 512 x 512 pixels


def drawn(ink="black", ground="white", width=6, size=512) -> Image.Image:
    """A circle of one line."""
    picture = Image.new("RGB", (size, size), ground)
    x, y, radius = (value * size / 512 for value in CIRCLE)
    outer = radius + width / 2
    ImageDraw.Draw(picture).ellipse([x - outer, y - outer, x + outer, y + outer], outline=ink, width=width)
    return picture


def whites(picture: Image.Image) -> np.ndarray:
    """(H, W), from 0 to 1."""
    pixels = np.asarray(picture)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0] / 255


def from_circle(size: int = 512) -> np.ndarray:
    """How far each pixel is from the circle's line, in pixels."""
    x, y, radius = (value * size / 512 for value in CIRCLE)
    rows, columns = np.mgrid[:size, :size]
    return np.abs(np.hypot(columns - x, rows - y) - radius)


@pytest.mark.parametrize(
    ("ink", "ground"),
    [
        ("black", "white"),
        ("white", "black"),
        ("red", (60, 60, 60)),
        ((190, 190, 190), "white"),
        ((200, 0, 0), (0, 102, 0)),
    ],
)
@pytest.mark.parametrize("width", [1, 2, 6, 10])
def test_a_scribble_is_the_middle_of_the_line_in_any_colours_and_of_any_width(ink, ground, width):
    found = whites(scribble(drawn(ink, ground, width)))
    assert set(np.unique(found)) == {0, 1}
    # Six pixels of 512 by default, and a pixel for the circle's own corners.
    assert from_circle()[found == 1].max() < 3 + 1.5
    assert found[from_circle() < 1].all()


@pytest.mark.parametrize("thickness", [1, 3, 9, 15])
def test_lines_of_a_scribble_have_the_thickness_asked_for(thickness):
    found = whites(scribble(drawn(), thickness))
    length = 2 * np.pi * CIRCLE[2]
    assert found.sum() / length == pytest.approx(thickness, abs=0.5)


@pytest.mark.parametrize("size", [128, 256, 1024])
def test_a_drawing_of_another_size_gives_the_same_scribble_in_that_size(size):
    found = whites(scribble(drawn(width=max(1, 6 * size // 512), size=size)))
    resized = np.asarray(Image.fromarray(whites(scribble(drawn())) > 0).resize((size, size)))
    assert found.shape == (size, size)
    assert found.sum() == pytest.approx(resized.sum(), rel=0.35)  # whole pixels, of lines that are 1.5 to 12 wide
    assert from_circle(size)[found == 1].max() < 3 * size / 512 + 1.5


def test_soft_edges_are_white_in_the_middle_of_a_line_and_fade_to_either_side():
    found = whites(soft_edges(drawn(width=3)))
    by_distance = [found[(from_circle() >= step) & (from_circle() < step + 1)].mean() for step in range(12)]
    assert by_distance[0] > 0.6
    assert by_distance == sorted(by_distance, reverse=True)
    assert by_distance[-1] < 0.01


@BOTH
def test_an_area_gives_its_outline(function):
    picture = Image.new("RGB", (512, 512), "white")
    x, y, radius = CIRCLE
    ImageDraw.Draw(picture).ellipse([x - radius, y - radius, x + radius, y + radius], fill="navy")
    found = whites(function(picture))
    assert found[from_circle() < 1].min() > 0.6
    assert not found[from_circle() > 14].any()


@BOTH
@pytest.mark.parametrize("grain", [0, 10])
def test_blank_paper_gives_nothing(function, grain):
    paper = 245 - np.random.default_rng(0).integers(0, grain + 1, (60, 40, 3))
    found = function(paper)
    assert (found.mode, found.size) == ("RGB", (40, 60))
    assert not whites(found).any()


def test_a_scribble_of_soft_edges_is_that_of_the_drawing():
    once, twice = whites(scribble(drawn())), whites(scribble(soft_edges(drawn())))
    assert (once == twice).mean() > 0.99
    assert once.sum() == pytest.approx(twice.sum(), rel=0.1)


def test_a_line_at_the_border_is_kept():
    picture = Image.new("L", (256, 256), 255)
    ImageDraw.Draw(picture).line([0, 100, 255, 100], fill=0, width=3)
    assert whites(scribble(picture))[100].all()


@pytest.mark.parametrize("thickness", [0, 0.5, -3])
def test_a_thickness_below_a_pixel_is_refused(thickness):
    with pytest.raises(ValueError, match="at least one pixel, got"):
        scribble(drawn(), thickness)


@pytest.mark.parametrize("angle", [0, 20, 45, 70, 90, 135])
def test_the_ridge_of_a_smooth_line_is_one_pixel_wide_at_any_angle(angle):
    rows, columns = np.mgrid[:64, :64] - 31.3
    away = np.cos(np.radians(angle)) * rows - np.sin(np.radians(angle)) * columns
    values = np.exp(-((away / 4) ** 2))
    found = ridges(values)[8:-8, 8:-8]
    assert np.abs(away[8:-8, 8:-8][found]).max() < 0.8
    across = found.any(axis=0) if angle <= 45 or angle == 135 else found.any(axis=1)
    assert across.all()
