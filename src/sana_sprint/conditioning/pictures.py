"""Pictures as callers have them to RGB, and what was found in one to a picture of white on black.

C channels, H W pixels.
"""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

Picture = Image.Image | np.ndarray | torch.Tensor

# Sizes in pixels here are meant for pictures of this short side, and shrink and grow with it.
REFERENCE_SIDE = 1024


def opencv() -> Any:
    """OpenCV's module.

    Raises:
        ImportError: naming the extra, if it is not installed.
    """
    try:
        return import_module("cv2")
    except ImportError as error:
        raise ImportError("finding lines in pictures needs OpenCV: pip install 'sana-sprint[control]'") from error


def _from_pil(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise ValueError(f"a picture must have 8 bits per channel, got one of the mode {picture.mode}")
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError("the picture is transparent in places: paste it on a ground, such as white, first")
    return picture.convert("RGB")


def _from_numbers(values: np.ndarray) -> Image.Image:
    """(H, W, 1) or (H, W, 3); whole numbers to 255, or others from 0 to 1."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError("a picture of floating-point numbers must have them from 0 to 1")
        values = (values * 255).round()
    elif values.dtype.kind == "b":
        values = values * 255
    elif values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise ValueError("a picture of whole numbers must have them from 0 to 255")
    return Image.fromarray(np.repeat(values.astype(np.uint8), 3 // values.shape[2], axis=2))


def read_picture(picture: Picture) -> Image.Image:
    """One picture of any size in RGB.

    Args:
        picture: of PIL in any mode of 8 bits; an array (H, W), (H, W, 1) or (H, W, 3); a tensor (H, W), (1, H, W),
            (3, H, W) or one of those in a batch of one. Whole numbers from 0 to 255, or floats from 0 to 1.

    Raises:
        ValueError: for something else, numbers out of range, or a picture that is transparent in places.
    """
    if isinstance(picture, Image.Image):
        return _from_pil(picture)
    if isinstance(picture, torch.Tensor):
        tensor = picture.detach().cpu()
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
        values = tensor.numpy() if tensor.ndim != 3 else tensor.permute(1, 2, 0).numpy()
    elif isinstance(picture, np.ndarray):
        values = picture
    else:
        raise ValueError(f"a picture must be of PIL, an array or a tensor, got {type(picture).__name__}")
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] not in (1, 3) or not values.size:
        raise ValueError(
            "a picture must have one channel or three, last in an array and first in a tensor, got the shape"
            f" {(*picture.shape,)}"
        )
    return _from_numbers(values)


def white_on_black(values: np.ndarray) -> Image.Image:
    """Strengths (H, W) from 0 to 1, or a mask, as a picture in RGB."""
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
