"""What a caller wants ControlNets to be shown, to drawings with their weight and their steps; and to their latents.

B pictures, C channels, H W latent grid.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from weakref import ref

import torch
from PIL import Image

from sana_sprint.pipelines.checks import finite_number
from sana_sprint.pipelines.pictures import Given, Picture, read_given, size_of
from sana_sprint.text.cache import Recent, fingerprint


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing(Given):
    """What one ControlNet is shown: one drawing, or one for each prompt or picture."""

    scale: float
    start: float  # share of the steps at which it begins to count
    end: float

    def scale_at(self, step: int, steps: int) -> float:
        """The factor of its residuals in a step, counted from 0; 0 unless all of the step lies within start and end."""
        return self.scale if self.start <= step / steps and (step + 1) / steps <= self.end else 0.0

    def counts(self, steps: int) -> bool:
        """Whether it has a part in any of so many steps."""
        return any(self.scale_at(step, steps) for step in range(steps))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownDrawing:
    """A drawing as a ControlNet sees it."""

    drawing: Drawing
    latents: torch.Tensor | None  # B C H W, scaled, in float32; None where it never counts


def read_drawings(
    control_image: Any, scale: Any, start: Any, end: Any, latent_channels: int, controlnets: int | None
) -> list[Drawing]:
    """The arguments `control_image`, `controlnet_conditioning_scale`, `control_guidance_start` and `_end`.

    Args:
        control_image, scale, start, end: for one ControlNet what it is shown, and numbers; for several a list of what
            each is shown, and numbers for all or for each.
        latent_channels: of a control image that is encoded already.
        controlnets: how many there are in a list; None for one by itself.

    Raises:
        ValueError: for lists of another length, what is no picture or has transparency, numbers out of range or NaN.
    """
    images: Sequence[Any] = [control_image]
    if controlnets is not None:
        images = control_image if isinstance(control_image, (list, tuple)) else ()
        if len(images) != controlnets:
            found = f"a list of {len(images)}" if images is control_image else type(control_image).__name__
            raise ValueError(f"control_image must be a list, one for each of {controlnets} ControlNets, got {found}")
    scales = _for_each("controlnet_conditioning_scale", scale, controlnets)
    starts = _for_each("control_guidance_start", start, controlnets)
    ends = _for_each("control_guidance_end", end, controlnets)
    drawings = []
    for image, factor, first, last in zip(images, scales, starts, ends, strict=True):
        if not 0 <= first < last <= 1:
            raise ValueError(
                "control_guidance_start must lie below control_guidance_end, both in [0, 1]:"
                f" got {first:g} and {last:g}"
            )
        given = read_given("control_image", image, latent_channels, opaque=True)
        drawings.append(Drawing(pictures=given.pictures, latents=given.latents, scale=factor, start=first, end=last))
    return drawings


def _for_each(name: str, value: Any, controlnets: int | None) -> list[float]:
    """A number for each ControlNet, from one for all or a list."""
    count = 1 if controlnets is None else controlnets
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} must be one number, or one for each of {count} ControlNets, got {values}")
    return [finite_number(name, one) for one in values]


def content_of(picture: Picture) -> Hashable:
    """What is equal for pictures of the same pixels only."""
    if isinstance(picture, Image.Image):
        return "image", size_of(picture), sha256(picture.tobytes()).digest()
    return "tensor", size_of(picture), sha256(picture.cpu().numpy().tobytes()).digest()


class DrawingCache:
    """The latents of the last drawings, for as long as the autoencoder and its weights stay what they are.

    What cannot be noticed is told in `text.cache.TextCache`, which asks the same of a text encoder: then `clear()`.

    Args:
        max_drawings: How many ControlNets' drawings are kept; 131 KB each for one picture of 1024 by 1024 pixels.
    """

    def __init__(self, max_drawings: int = 8) -> None:
        self.max_drawings = max_drawings
        self.clear()

    def __reduce__(self) -> tuple[type["DrawingCache"], tuple[int]]:
        """A copy is empty: a copied pipeline has another autoencoder."""
        return DrawingCache, (self.max_drawings,)

    def clear(self) -> None:
        """Forget everything."""
        self._encoder: list[Any] = []
        self._latents: Recent[torch.Tensor] = Recent(self.max_drawings)

    def latents(
        self, vae: Any, device: torch.device, drawing: Given, canvas: Hashable, encode: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The latents (drawings, C, H, W) of pictures on a canvas, encoded if they are not there. Not to be altered.

        Args:
            vae: what encodes them.
            device: where it computes.
            drawing: the pictures, none of them encoded already.
            canvas: what the pictures are fitted to.
            encode: gives their latents.
        """
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        tiles = vae.use_tiling, vae.tile_sample_min_height, vae.tile_sample_min_width
        present = [ref(vae), vae.config.scaling_factor, tiles, device, autocast, *fingerprint(vae)]
        if self._encoder != present:
            self.clear()
            self._encoder = present
        return self._latents.get((canvas, *map(content_of, drawing.pictures)), encode)
