"""The picture that a call starts from, checked and encoded: what image-to-image and inpainting share.

B pictures, C channels, H W latent grid.
"""

from typing import Any

import torch

from sana_sprint.pipelines.base import SprintPipeline
from sana_sprint.pipelines.call import Call, Known, Plan
from sana_sprint.pipelines.clock import Clock
from sana_sprint.pipelines.pictures import Source, read_source, redrawn_cells


class FromImagePipeline(SprintPipeline):
    """The stages of a pipeline whose calls have a `source`."""

    def read_source(self, image: Any, strength: Any, mask_image: Any = None) -> Source:
        """The arguments of a call that the source is made of; ValueError as in `pictures.read_source`."""
        return read_source(image, strength, self.transformer.config.in_channels, mask_image)

    @torch.no_grad()
    def encode_image(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        use_resolution_binning: bool = True,
    ) -> torch.Tensor:
        """Pictures to latents that `__call__` takes as `image`, so that many calls need not encode them again.

        Args:
            image: As for `__call__`.
            height, width, use_resolution_binning: As in the calls that are to follow.

        Returns:
            Latents (pictures, C, H, W) times the autoencoder's scaling factor, in float32: the scale of results.

        Raises:
            ValueError: for arguments that cannot work.
        """
        source = self.read_source(image, strength=1.0)
        canvas = self._choose_canvas(height, width, use_resolution_binning)
        self._check_given("image", source, canvas)
        return self._latents_of(source, canvas)

    def check_inputs(self, call: Call) -> Plan:
        """diffusers' name for the checks of a call, here those of its source too; ValueError if it cannot work."""
        plan = super().check_inputs(call)
        source = self.source_of(call)
        plan.rows("image", source.count)
        self._check_given("image", source, plan.canvas)
        return plan

    def source_of(self, call: Call) -> Source:
        """The source, which every call of these pipelines has."""
        assert call.source is not None
        return call.source

    def known_pictures(self, call: Call, plan: Plan, device: torch.device) -> Known | None:
        """What was given, encoded once for all that is drawn from it, and which cells of it are redrawn.

        None where nothing of it would be seen.
        """
        source = self.source_of(call)
        if source.strength == 1 and not source.masks:
            return None
        latents = self._latents_of(source, plan.canvas).to(device)[plan.rows("image", source.count)]
        if not source.masks:
            return Known(latents=latents, redrawn=latents.new_ones(1, 1, 1, 1))
        cells = torch.stack([redrawn_cells(mask, plan.canvas, self.vae_scale_factor) for mask in source.masks])
        return Known(latents=latents, redrawn=cells.to(device)[plan.rows("mask_image", len(cells))])

    def first_latents(self, call: Call, noise: torch.Tensor, known: Known | None, clock: Clock) -> torch.Tensor:
        """The picture with as much noise as the strength asks for; at strength 1 what is redrawn is noise alone."""
        if known is None:
            return clock.from_noise(noise)
        noised = clock.from_picture(known.latents, noise)
        if self.source_of(call).strength < 1:
            return noised
        # As in text to image, whose first angle need not be pi/2.
        return torch.lerp(noised, clock.from_noise(noise), known.redrawn)
