"""Pictures and masks in any form that a caller has them in, to tensors in the size that is drawn.

C channels, H W pixels of one picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_max_pool2d, avg_pool2d, interpolate, max_pool2d, pad

from sana_sprint.pipelines.checks import finite_number
from sana_sprint.pipelines.images import Canvas, seen_part

# One picture: a PIL image in mode RGB, or a tensor (3, H, W) in float32 with values in [0, 1].
Picture = Image.Image | torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """One or several pictures of a call, read but not yet checked against the rest of it."""

    pictures: Sequence[Picture]  # none where there are latents
    latents: torch.Tensor | None  # pictures, C, latent H, latent W; in the scale of results

    @property
    def count(self) -> int:
        """How many pictures were given."""
        return len(self.pictures) if self.latents is None else len(self.latents)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(Given):
    """What a call starts from."""

    masks: Sequence[torch.Tensor]  # 1 H W each, in [0, 1], 1 to be redrawn; none for all of every picture
    strength: float


def read_source(image: Any, strength: Any, latent_channels: int, mask_image: Any = None) -> Source:
    """The arguments `image`, `strength` and `mask_image` of a pipeline.

    Raises:
        ValueError: for anything else than what the pipelines' documents describe, and for values out of range or NaN.
    """
    share = finite_number("strength", strength)
    if not 0 <= share <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {share}")
    given = read_given("image", image, latent_channels)
    return Source(
        pictures=given.pictures,
        latents=given.latents,
        masks=[] if mask_image is None else read_masks(mask_image),
        strength=share,
    )


def read_given(name: str, image: Any, latent_channels: int, *, opaque: bool = False) -> Given:
    """Pictures as `read_pictures` takes them, or a tensor (pictures, C, H, W) with the channels of latents.

    Raises:
        ValueError: as `read_pictures`, and for latents that are not finite.
    """
    if not (isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == latent_channels):
        return Given(pictures=read_pictures(image, name, opaque=opaque), latents=None)
    if not len(image) or not image.isfinite().all():
        raise ValueError(f"{name} must be finite latents, got none or some that are not")
    return Given(pictures=[], latents=image.detach())


def read_pictures(image: Any, name: str = "image", *, opaque: bool = False) -> list[Picture]:
    """One or several pictures, one by one: grey becomes RGB, and what is transparent shows white.

    Args:
        image: what the caller passed.
        name: of the argument, for errors.
        opaque: refuse pictures that can be transparent.

    Raises:
        ValueError: for what is no picture, or has values beyond [0, 1] as floats, beyond 255 as uint8, or NaN.
    """
    pictures: list[Picture] = []
    for one in _one_by_one(name, image):
        is_image = isinstance(one, Image.Image)
        if opaque and (one.has_transparency_data if is_image else len(one) in (2, 4)):
            found = f"a PIL image in mode {one.mode}" if is_image else f"{len(one)} channels"
            raise ValueError(f"{name} must have no transparency, got {found}")
        pictures.append(_rgb_image(name, one) if is_image else _rgb_tensor(name, _in_unit_range(name, one)))
    if not pictures:
        raise ValueError(f"{name} must be a picture or several, got an empty list")
    return pictures


def read_masks(mask_image: Any) -> list[torch.Tensor]:
    """One or several masks, one by one, as (1, H, W) in [0, 1].

    Raises:
        ValueError: for what is no mask of one channel, or has values out of range or NaN.
    """
    masks = [_mask(one) for one in _one_by_one("mask_image", _as_batch_of_masks(mask_image))]
    if not masks:
        raise ValueError("mask_image must be a mask or several, got an empty list")
    return masks


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width in pixels, of a mask too."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:]
    return height, width


def resized(picture: Picture, height: int, width: int) -> torch.Tensor:
    """A picture (3, H, W), or a mask (1, H, W), in another size and if need be another shape.

    PIL images are resampled by Lanczos' filter as in diffusers, tensors linearly, without aliasing.
    """
    if isinstance(picture, Image.Image):
        return _unit_tensor(picture.resize((width, height), Image.Resampling.LANCZOS))
    if size_of(picture) == (height, width):
        return picture
    return interpolate(picture[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True)[0]


def on_canvas(picture: Picture, canvas: Canvas) -> torch.Tensor:
    """A picture (3, H, W) in the size drawn, from where `fit_to_canvas` takes it back to the size asked for.

    What `fit_to_canvas` cuts off has no place in the picture: there its border goes on.
    """
    part = seen_part(canvas)
    return _continued(resized(picture, part.height, part.width), canvas)


def redrawn_cells(mask: torch.Tensor, canvas: Canvas, cell: int) -> torch.Tensor:
    """How much of each latent cell is to be redrawn (1, latent H, latent W), in [0, 1], for a mask in pixels.

    A cell with a pixel to be redrawn is redrawn as much as that pixel. Around those the mask is feathered by one cell,
    so that what is drawn can meet what is kept.
    """
    part = seen_part(canvas)
    pixels = _continued(adaptive_max_pool2d(mask[None], (part.height, part.width))[0], canvas)
    cells = max_pool2d(pixels, cell)
    return torch.maximum(cells, avg_pool2d(cells, 3, stride=1, padding=1, count_include_pad=False))


def _continued(part: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """The part of a canvas that is seen, with its border repeated up to the canvas's."""
    seen = seen_part(canvas)
    below, right = canvas.height - seen.height - seen.top, canvas.width - seen.width - seen.left
    return pad(part[None], (seen.left, right, seen.top, below), mode="replicate")[0]


def _one_by_one(name: str, given: Any) -> Iterator[Any]:
    """PIL images as they are, arrays and tensors as tensors (C, H, W)."""
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _one_by_one(name, one)
    elif isinstance(given, Image.Image):
        yield given
    elif isinstance(given, (np.ndarray, torch.Tensor)) and given.ndim in (2, 3, 4) and 0 not in given.shape:
        channels_last = isinstance(given, np.ndarray)
        pixels = torch.from_numpy(np.array(given, order="C")) if isinstance(given, np.ndarray) else given.detach()
        if pixels.ndim == 2:
            pixels = pixels[..., None] if channels_last else pixels[None]
        batch = pixels if pixels.ndim == 4 else pixels[None]
        yield from batch.permute(0, 3, 1, 2) if channels_last else batch
    else:
        found = f"one of shape {tuple(given.shape)}" if hasattr(given, "shape") else repr(given)
        raise ValueError(
            f"{name} must be a PIL image, an array (height, width, channels) or a tensor (channels, height, width), a"
            f" batch or a list of them, got {found}"
        )


def _as_batch_of_masks(given: Any) -> Any:
    """The same masks, in which three dimensions of an array or a tensor are those of several masks."""
    if isinstance(given, (list, tuple)):
        return [_as_batch_of_masks(one) for one in given]
    if isinstance(given, torch.Tensor) and given.ndim == 3:
        return given[:, None]
    if isinstance(given, np.ndarray) and given.ndim == 3 and given.shape[-1] not in (1, 3, 4):
        return given[..., None]
    return given


def _mask(given: Any) -> torch.Tensor:
    if isinstance(given, Image.Image):
        if given.has_transparency_data:
            raise ValueError(f"mask_image must have no transparency, got a PIL image in mode {given.mode}")
        return _unit_tensor(_checked_mode("mask_image", given).convert("L"))
    if len(given) != 1:
        raise ValueError(f"mask_image must have one channel, got {len(given)}")
    # Of whole numbers, 0 and 1 mean what they do as floats: a mask in which nothing is above 1/255 has no other use.
    is_binary = given.dtype == torch.uint8 and given.max() <= 1
    return _in_unit_range("mask_image", given.bool() if is_binary else given)


def _rgb_image(name: str, image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _checked_mode(name, image).convert("RGB")


def _checked_mode(name: str, image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # Pillow would cut off what is above 255 without a word
        raise ValueError(f"{name} must have 8 bits for each colour, got a PIL image in mode {image.mode}")
    return image


def _rgb_tensor(name: str, pixels: torch.Tensor) -> torch.Tensor:
    channels = len(pixels)
    if channels > 4:
        raise ValueError(f"{name} must have 1 to 4 channels, got {channels}")
    if channels % 2 == 0:
        colour, opacity = pixels[:-1], pixels[-1:]
        pixels = colour * opacity + (1 - opacity)
    return pixels.expand(3, -1, -1)


def _unit_tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))  # H W, or H W C
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).float() / 255


def _in_unit_range(name: str, pixels: torch.Tensor) -> torch.Tensor:
    values = pixels.to(torch.float32)
    if pixels.dtype == torch.uint8:
        return values / 255
    low, high = (float(one) for one in values.aminmax())
    if not (low >= 0 and high <= 1):  # nor for nan
        raise ValueError(f"{name} must hold values in [0, 1], or in 0 to 255 as uint8, got {low:g} to {high:g}")
    return values
