"""What a training step asks of its data, whatever that is kept in: the interface, and the batch it hands over.

B examples of one process, C channels, h w latent grid, L and K text tokens.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sana_sprint.training.draws import Draws


@dataclass(frozen=True)
class LatentBatch:
    """What one step of one process learns from. Masks are 1 for a token and 0 for padding."""

    clean: torch.Tensor  # B C h w, already times the autoencoder's scaling factor
    caption: torch.Tensor  # B L width
    mask: torch.Tensor  # B L
    # A caption of another example for each, as a discriminator is shown that what does not belong together is wrong.
    wrong_caption: torch.Tensor | None = None  # B L width
    wrong_mask: torch.Tensor | None = None  # B L
    # Latents of what a ControlNet is shown of each picture, its edges for example.
    control: torch.Tensor | None = None  # B C h w

    def repeated(self, times: int) -> "LatentBatch":
        """The same examples (times * B), one batch after the other."""
        present = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: torch.cat([value] * times) for name, value in present.items()})


class LatentSource(Protocol):
    """Latents with encoded captions.

    What a step gets depends on seed, step and the size of the whole batch alone: it is the same after a resume, and
    however the batch is divided among processes.
    """

    def batch(self, draws: Draws, caption_dropout: float = 0.0, misaligned: bool = False) -> LatentBatch:
        """This process's part of a step's batch.

        Args:
            draws: Those of the step.
            caption_dropout: Share of the captions replaced by the empty one.
            misaligned: Whether to add the captions of other examples.
        """

    def empty_caption(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, K, width) and mask (B, K) of the empty caption, `size` times."""

    def identity(self) -> str:
        """A few digits that change with what the batches are made of."""

    def to(self, device: torch.device) -> "LatentSource":
        """The same source, with its batches on a device."""
