"""A drawing, lines on a ground, to soft edges or to a scribble: its lines in white on black.

H W pixels. Widths are meant for a short side of 1024 pixels, and shrink and grow with the drawing.
"""

import numpy as np
from PIL import Image

from sana_sprint.conditioning.pictures import REFERENCE_SIDE, Picture, opencv, read_picture, white_on_black

# Of 255: a drawing that differs less from its ground is blank paper.
MIN_CONTRAST = 16
# What is broader than this is no line but an area, and gives its outline.
BROADEST_LINE = 24
# Lines are broadened by this much to either side and then blurred, so that thin ones peak about as high as HED's.
BROADENING, BLUR = 4, 3.0
# Of the height of the strongest line's middle: what is lower is no line but the grain of the paper.
MIN_HEIGHT = 0.1
# What NVlabs' scribbles have after thinning, blurring (a standard deviation of 3 pixels) and thresholding (4 of 255).
THICKNESS = 12
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def strokes(drawing: Image.Image) -> np.ndarray:
    """How far each pixel's colour is from the ground's, which is the median: (H, W), the furthest 1."""
    colours = np.asarray(drawing, dtype=np.float32)
    distance = np.abs(colours - np.median(colours, axis=(0, 1))).max(axis=2)
    contrast = distance.max()
    return distance / contrast if contrast >= MIN_CONTRAST else np.zeros_like(distance)


def _soften(strength: np.ndarray) -> np.ndarray:
    """Strokes (H, W) from 0 to 1 as soft lines: broadened and blurred, areas replaced by their outlines."""
    cv2 = opencv()
    unit = min(strength.shape) / REFERENCE_SIDE

    def disk(radius: float) -> np.ndarray:
        side = 2 * max(1, round(radius * unit)) + 1
        return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))

    areas = cv2.morphologyEx(strength, cv2.MORPH_OPEN, disk(BROADEST_LINE / 2))
    outlines = cv2.morphologyEx(areas, cv2.MORPH_GRADIENT, disk(1))
    lines = cv2.dilate(np.maximum(strength - areas, outlines), disk(BROADENING))
    return cv2.GaussianBlur(lines, (0, 0), max(1, BLUR * unit)).clip(0, 1)


def ridges(values: np.ndarray) -> np.ndarray:
    """A mask (H, W) of where values (H, W) are the largest across the line they lie on.

    Across a line is, of the four directions between pixels, the one in which values bend the most.
    """
    height, width = values.shape
    padded = np.pad(values, 1, mode="edge")
    bends, peaks = [], []
    for down, right in DIRECTIONS:
        ahead, behind = (padded[1 + sign * down :, 1 + sign * right :][:height, :width] for sign in (1, -1))
        bends.append(np.abs(2 * values - ahead - behind) / (down**2 + right**2))
        peaks.append((values > np.minimum(ahead, behind)) & (values >= np.maximum(ahead, behind)))
    across = np.argmax(bends, axis=0)
    return np.take_along_axis(np.stack(peaks), across[None], axis=0)[0]


def soft_edges(drawing: Picture) -> Image.Image:
    """The lines of a drawing as a network such as HED would see them: soft, some ten pixels wide.

    An area gives its outline. Of a photograph, take `hed`.

    Args:
        drawing: lines of any colours on a ground of any colour, see `read_picture`.

    Raises:
        ValueError: for what is no picture.
        ImportError: if OpenCV is not installed.
    """
    return white_on_black(_soften(strokes(read_picture(drawing))))


def scribble(drawing: Picture, thickness: float | None = None) -> Image.Image:
    """The lines of a drawing, all of one thickness, as NVlabs makes scribbles of soft edges.

    Soft edges are thinned to their middles, and these drawn anew. An area gives its outline.

    Args:
        drawing: lines of any colours on a ground of any colour; or soft edges, such as `hed` finds in a photograph.
        thickness: of the lines, in pixels; None for 12 of 1024, as NVlabs' are by default.

    Raises:
        ValueError: for a thickness below one pixel, or what is no picture.
        ImportError: if OpenCV is not installed.
    """
    if thickness is not None and thickness < 1:
        raise ValueError(f"thickness must be at least one pixel, got {thickness}")
    cv2 = opencv()
    soft = _soften(strokes(read_picture(drawing)))
    middles = ridges(soft) & (soft > MIN_HEIGHT)
    if not middles.any():
        return white_on_black(middles)
    if thickness is None:
        thickness = max(1, THICKNESS * min(soft.shape) / REFERENCE_SIDE)
    distance = cv2.distanceTransform(np.uint8(~middles), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return white_on_black(distance <= (thickness - 1) / 2)
