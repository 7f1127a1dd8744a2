"""A picture to its depth or its soft edges, by networks of controlnet_aux."""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from PIL import Image

from sana_sprint.conditioning.pictures import REFERENCE_SIDE, Picture, read_picture

# On the hub: the weights of all networks of controlnet_aux.
WEIGHTS = "lllyasviel/Annotators"
# controlnet_aux works in multiples of this.
MIN_SIDE = 64


@cache
def _detector(name: str) -> Any:
    # It warns of what its other detectors need, and of old names of models.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = import_module("controlnet_aux")
        except ImportError as error:
            raise ImportError("depth and hed need controlnet_aux: pip install 'sana-sprint[control]'") from error
        return getattr(module, name).from_pretrained(WEIGHTS)


def detect(detector: Any, picture: Picture) -> Image.Image:
    """What a detector of controlnet_aux finds in a picture, in RGB and of the picture's size."""
    rgb = read_picture(picture)
    side = min(max(min(rgb.size), MIN_SIDE), REFERENCE_SIDE)
    found = detector(rgb, detect_resolution=side, image_resolution=side, output_type="pil")
    return found.convert("RGB").resize(rgb.size, Image.Resampling.BICUBIC)


def hed(picture: Picture, device: str | torch.device = "cpu") -> Image.Image:
    """Soft edges of a picture, white on black, by holistically nested edge detection (HED; arXiv 1504.06375).

    What NVlabs' ControlNets are trained with, once thinned by `scribble`.

    Args:
        picture: see `read_picture`.
        device: where the network runs.

    Raises:
        ValueError: for what is no picture.
        ImportError: if controlnet_aux is not installed.
    """
    return detect(_detector("HEDdetector").to(device), picture)


def depth(picture: Picture, device: str | torch.device = "cpu") -> Image.Image:
    """How near things are, the nearest white, by MiDaS (arXiv 1907.01341). Arguments and errors as for `hed`."""
    return detect(_detector("MidasDetector").to(device), picture)
