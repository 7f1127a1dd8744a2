"""Canny edges: of a square whose outline is known, and of the shapes world."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sana_sprint.conditioning.edges import edges
from sana_sprint.shapes.renderer import render
from sana_sprint.shapes.sampler import draw_example

pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")


def is_edge(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    assert set(np.unique(pixels)) <= {0, 255}
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0] > 0


def near(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Where the mask is set within so many rows and columns."""
    padded = np.pad(mask, pixels)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * pixels + 1,) * 2)
    return windows.any(axis=(2, 3))


def test_the_edges_of_a_square_are_its_outline_and_nothing_else():
    picture = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(picture).rectangle([20, 10, 60, 40], fill="navy")
    outline = Image.new("L", picture.size)
    ImageDraw.Draw(outline).rectangle([20, 10, 60, 40], outline=255)
    found, wanted = is_edge(edges(picture)), np.asarray(outline) > 0
    assert found.shape == (60, 90)
    assert not (found & ~near(wanted, 1)).any()
    assert not (wanted & ~near(found, 1)).any()
    assert found.sum() < 1.1 * wanted.sum()  # one pixel wide


@pytest.mark.parametrize("size", [64, 128])
def test_the_edges_of_a_drawn_scene_are_where_its_colours_change(size):
    rng = np.random.default_rng(5)
    for _ in range(20):
        pixels = render(draw_example(rng).scene, size)
        found = is_edge(edges(pixels))
        steps = np.abs(np.diff(pixels.astype(int), axis=0, append=pixels[-1:])).max(axis=2)
        steps = np.maximum(steps, np.abs(np.diff(pixels.astype(int), axis=1, append=pixels[:, -1:])).max(axis=2))
        assert found.any()
        assert not (found & ~near(steps > 0, 1)).any()
        assert (near(found, 2) | (steps < 64)).mean() > 0.999  # but for a tip or two


def test_an_edge_between_colours_of_equal_brightness_is_found():
    picture = Image.new("RGB", (40, 40), (200, 0, 0))
    ImageDraw.Draw(picture).rectangle([20, 0, 39, 39], fill=(0, 102, 0))
    grey = picture.convert("L")
    assert grey.getextrema() == (60, 60)
    assert is_edge(edges(picture))[:, 18:22].any(axis=1).all()


def test_thresholds_decide_which_edges_count():
    picture = Image.new("L", (40, 40), 100)
    ImageDraw.Draw(picture).rectangle([20, 0, 39, 39], fill=120)  # a gradient of 80
    assert not is_edge(edges(picture)).any()
    assert is_edge(edges(picture, low=40, high=70)).any()
    assert not is_edge(edges(picture, low=40, high=90)).any()


@pytest.mark.parametrize(("low", "high"), [(200, 100), (-1, 100)])
def test_thresholds_out_of_order_are_refused(low, high):
    with pytest.raises(ValueError, match=f"0 <= low <= high, got low={low}, high={high}"):
        edges(Image.new("L", (8, 8)), low=low, high=high)
