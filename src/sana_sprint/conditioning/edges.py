"""A picture to its edges."""

import numpy as np
from PIL import Image

from sana_sprint.conditioning.pictures import Picture, opencv, read_picture, white_on_black


def edges(picture: Picture, low: float = 100, high: float = 200) -> Image.Image:
    """Edges one pixel wide, white on black (Canny, 1986), in whichever colour channel they are the strongest.

    Args:
        picture: see `read_picture`.
        low, high: of the gradient, |dx| + |dy| by Sobel's filters, up to 2040. An edge has `high` somewhere along its
            way, and `low` everywhere. The defaults are those that ControlNets are commonly trained with.

    Raises:
        ValueError: for thresholds out of order, or what is no picture.
        ImportError: if OpenCV is not installed.
    """
    if not 0 <= low <= high:
        raise ValueError(f"thresholds must be 0 <= low <= high, got low={low}, high={high}")
    found = opencv().Canny(np.asarray(read_picture(picture)), low, high)  # H W
    return white_on_black(found > 0)
