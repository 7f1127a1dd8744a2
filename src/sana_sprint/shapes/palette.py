"""The twelve colours of the shapes world as sRGB, and sRGB to OKLab, where distances match what an eye sees."""

from __future__ import annotations

import numpy as np

SHAPE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 22, 38),
    "orange": (255, 136, 0),
    "yellow": (255, 232, 32),
    "green": (24, 168, 56),
    "blue": (28, 72, 230),
    "purple": (140, 24, 190),
    "pink": (255, 128, 200),
    "cyan": (24, 214, 232),
}
GROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "black": (10, 10, 12),
    "grey": (132, 132, 132),
    "brown": (100, 56, 24),
}
PALETTE: dict[str, tuple[int, int, int]] = {**SHAPE_COLOURS, **GROUND_COLOURS}

# Smallest OKLab distance between two colours of the palette that may meet in a picture; black to white is about 0.9.
MINIMUM_DISTANCE = 0.18

_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) of sRGB (..., 3) in 0..255 (Ottosson, "A perceptual color space for image processing", 2020)."""
    encoded = np.asarray(rgb, dtype=np.float64) / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T
