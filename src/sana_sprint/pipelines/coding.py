"""Pixels to scaled latents and back with a pipeline's autoencoder: at once, or in parts where memory does not suffice.

B pictures, C channels, H W latent grid.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import empty_device_cache

from sana_sprint.pipelines.placement import PlacedPipeline

logger = logging.getLogger(__name__)


@contextmanager
def _in_small_parts(vae: Any) -> Iterator[None]:
    """Inside, an autoencoder works on one picture at a time and in tiles, and as it is written if it was compiled."""
    before = vae.use_slicing, vae.use_tiling
    vae.enable_slicing()
    vae.enable_tiling()
    try:
        # Compiled, it would be so anew for the size of a tile, and without the strips that save memory.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        vae.use_slicing, vae.use_tiling = before


class CodingPipeline(PlacedPipeline):
    """A pipeline that encodes and decodes with its `vae`."""

    _has_told_of_tiling = False

    def enable_vae_slicing(self) -> None:
        """Encode and decode the pictures of a batch one by one: less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large pictures in overlapping tiles: less memory, nearly the same picture."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode pictures in one piece."""
        self.vae.disable_tiling()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) in [0, 1] to scaled latents (B, C, H, W) in float32.

        Raises:
            torch.OutOfMemoryError: if there is not enough memory even for one tile of one picture.
        """
        pixels = (2 * pixels - 1).to(self.device_of("vae"), self.vae.dtype)
        latents = self._in_parts_if_need_be("encode", self.vae.encode, pixels)
        self.put_away("vae")
        return latents.float() * self.vae.config.scaling_factor

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, H, W) to pixels (B, 3, height, width) in [-1, 1].

        Raises:
            torch.OutOfMemoryError: if there is not enough memory even for one tile of one picture.
        """
        latents = latents.to(self.device_of("vae"), self.vae.dtype) / self.vae.config.scaling_factor
        return self._in_parts_if_need_be("decode", self.vae.decode, latents)

    def _in_parts_if_need_be(self, verb: str, network: Callable[..., Any], inputs: torch.Tensor) -> torch.Tensor:
        try:
            return network(inputs, return_dict=False)[0]
        except torch.OutOfMemoryError:
            pass  # and on: the exception, while it is handled, keeps alive what filled the memory
        gc.collect()
        empty_device_cache()
        if not self._has_told_of_tiling:
            self._has_told_of_tiling = True
            logger.warning(
                "not enough memory to %s a batch of %s at once: it is done picture by picture and in tiles;"
                " enable_vae_slicing() and enable_vae_tiling() do so from the start",
                verb,
                "x".join(map(str, inputs.shape)),
            )
        with _in_small_parts(self.vae):
            try:
                return network(inputs, return_dict=False)[0]
            except torch.OutOfMemoryError as error:
                instead = {
                    "encode": "encode elsewhere and pass the latents as image",
                    "decode": "draw with output_type='latent' and decode elsewhere",
                }[verb]
                raise torch.OutOfMemoryError(
                    f"not enough memory to {verb} even one tile of {self.vae.tile_sample_min_height}x"
                    f"{self.vae.tile_sample_min_width} pixels: take smaller ones (vae.enable_tiling("
                    "tile_sample_min_height=256, tile_sample_min_width=256)), free memory with"
                    f" enable_model_cpu_offload(), or {instead}"
                ) from error
