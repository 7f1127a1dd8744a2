"""A scene in, its anti-aliased picture out; lengths in a scene are fractions of the picture's side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sana_sprint.shapes.palette import GROUND_COLOURS, SHAPE_COLOURS
from sana_sprint.shapes.scenes import Scene

# Every shape fits the square [-1, 1]² (in units of its radius); these proportions make their areas look alike.
_SQUARE_HALF_SIDE = 0.86
_TRIANGLE_CIRCUMRADIUS = 2 / np.sqrt(3)
_STAR_RADIUS = 1.05
_STAR_INNER = 0.46  # inner over outer radius: a pentagram has 0.38, but its tips blur away in a small picture
_CROSS_LENGTH = 0.95
_CROSS_HALF_WIDTH = 0.32


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    across, along = np.abs(x) - half_width, np.abs(y) - half_height
    outside = np.hypot(np.maximum(across, 0.0), np.maximum(along, 0.0))
    return outside + np.minimum(np.maximum(across, along), 0.0)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, _SQUARE_HALF_SIDE, _SQUARE_HALF_SIDE)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Three half-planes at the inradius; the shift centres the bounding box, not the centroid.
    y = y - _TRIANGLE_CIRCUMRADIUS / 4
    slanted = np.abs(x) * np.sin(np.pi / 3) - y / 2
    return np.maximum(slanted, y) - _TRIANGLE_CIRCUMRADIUS / 2


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Folded into one tenth of the plane, the outline is a single line from a tip to the notch beside it.
    y = _STAR_RADIUS * (1 - np.cos(np.pi / 5)) / 2 - y
    fold = np.pi / 5
    angle = np.abs((np.arctan2(x, y) + fold) % (2 * fold) - fold)
    distance = np.hypot(x, y)
    notch_x, notch_y = _STAR_INNER * np.sin(fold), _STAR_INNER * np.cos(fold)
    length = np.hypot(notch_x, 1 - notch_y)
    normal_x, normal_y = (1 - notch_y) / length, notch_x / length
    return distance * (np.sin(angle) * normal_x + np.cos(angle) * normal_y) - _STAR_RADIUS * normal_y


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    upright = _box(x, y, _CROSS_HALF_WIDTH, _CROSS_LENGTH)
    return np.minimum(upright, _box(x, y, _CROSS_LENGTH, _CROSS_HALF_WIDTH))


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def coverage(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Covered fraction, 0 to 1, of the pixels whose centres lie at (x, y), in pixels, from the shape's centre.

    `radius` is in pixels, and y points down. `x` and `y` broadcast against each other.
    """
    x, y = np.broadcast_arrays(x / radius, y / radius)
    return np.clip(0.5 - radius * _DISTANCES[kind](x, y), 0.0, 1.0)


def cover(scene: Scene, size: int = 64) -> np.ndarray:
    """Where the shapes of a scene cover at least half of a pixel: bool (size, size)."""
    centres = np.arange(size) + 0.5
    covered = [
        coverage(shape.kind, centres - shape.x * size, centres[:, None] - shape.y * size, shape.radius * size)
        for shape in scene.shapes
    ]
    return np.max(covered, axis=0) >= 0.5


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Picture of a scene, uint8 (size, size, 3), edges smoothed over one pixel.

    Raises:
        ValueError: `size` is below 16, where small shapes are no longer told apart at all.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = GROUND_COLOURS[scene.ground]
    for shape in scene.shapes:
        reach = shape.radius + 2 / size
        columns = slice(max(0, int((shape.x - reach) * size)), int((shape.x + reach) * size) + 1)
        rows = slice(max(0, int((shape.y - reach) * size)), int((shape.y + reach) * size) + 1)
        patch = picture[rows, columns]  # a view, painted in place
        x = np.arange(columns.start, columns.start + patch.shape[1]) + 0.5 - shape.x * size
        y = np.arange(rows.start, rows.start + patch.shape[0]) + 0.5 - shape.y * size
        covered = coverage(shape.kind, x[None, :], y[:, None], shape.radius * size)[..., None]
        patch += covered * (np.array(SHAPE_COLOURS[shape.colour]) - patch)
    return np.rint(picture).astype(np.uint8)
