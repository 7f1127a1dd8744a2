"""The picture size asked for to the size to draw, and drawn pixels to pictures of the size asked for.

Sizes are in pixels unless they are called latent.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import PixArtImageProcessor
from torch.nn.functional import interpolate

from sana_sprint.pipelines.checks import whole_number

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The size that is drawn, and the size that the caller asked for and gets."""

    height: int
    width: int
    asked_height: int
    asked_width: int


def resolution_bins(native_size: int) -> dict[str, list[float]] | None:
    """The sizes that a model of this native size was trained on: aspect ratio (height / width) to height and width.

    diffusers' own tables, which are those of SANA's training. They exist for 512, 1024, 2048 and 4096 pixels, which is
    a transformer `sample_size` of 16, 32, 64 and 128 with the 32 times smaller latents of the published models. None
    for any other size.
    """
    # Imported as they are needed: each lies in the module of a pipeline with many imports of its own.
    if native_size == 512:
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN as bins
    elif native_size == 1024:
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN as bins
    elif native_size == 2048:
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN as bins
    elif native_size == 4096:
        from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN as bins
    else:
        return None
    return bins


def choose_canvas(height: Any, width: Any, *, native_size: int, multiple: int, use_bins: bool) -> Canvas:
    """The size to draw for a size asked for.

    Args:
        height, width: As asked for; None for the native size.
        native_size: Side of the square pictures that the model was trained for.
        multiple: What height and width must be multiples of for the networks.
        use_bins: Draw the size nearest in shape that the model was trained on, where it has a table of those.

    Raises:
        ValueError: if a size is not a positive whole number, or cannot be drawn.
    """
    height = native_size if height is None else whole_number("height", height)
    width = native_size if width is None else whole_number("width", width)
    bins = resolution_bins(native_size) if use_bins else None
    if bins is not None:
        drawn_height, drawn_width = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=bins)
    else:
        drawn_height, drawn_width = height, width
    if drawn_height % multiple or drawn_width % multiple:
        raise ValueError(f"height and width must be multiples of {multiple}, got {drawn_height}x{drawn_width}")
    return Canvas(height=drawn_height, width=drawn_width, asked_height=height, asked_width=width)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rectangle of a canvas."""

    top: int
    left: int
    height: int
    width: int


def seen_part(canvas: Canvas) -> Part:
    """What of the size drawn is still seen in the size asked for."""
    scale = max(canvas.asked_height / canvas.height, canvas.asked_width / canvas.width)
    height = min(canvas.height, max(1, round(canvas.asked_height / scale)))
    width = min(canvas.width, max(1, round(canvas.asked_width / scale)))
    return Part(top=(canvas.height - height) // 2, left=(canvas.width - width) // 2, height=height, width=width)


def fit_to_canvas(pictures: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Pictures (B, C, H, W) resized to cover the size asked for, and cropped to it around the middle."""
    height, width = pictures.shape[-2:]
    if (height, width) == (canvas.asked_height, canvas.asked_width):
        return pictures
    scale = max(canvas.asked_height / height, canvas.asked_width / width)
    # At least the size asked for: 704 * (359 / 704) is a little less than 359, and int() would leave a row out.
    covering = (max(canvas.asked_height, int(height * scale)), max(canvas.asked_width, int(width * scale)))
    pictures = interpolate(pictures, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - canvas.asked_height) // 2, (covering[1] - canvas.asked_width) // 2
    return pictures[:, :, top : top + canvas.asked_height, left : left + canvas.asked_width]
