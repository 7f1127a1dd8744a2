"""Images at one resolution to the next, half or double, with shortcuts that carry every value across without weights.

B batch, C channels, H W grid. All in channels-last memory.
"""

import torch
import torch.nn.functional as F
from torch import nn

FACTOR = 2


def average_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Mean over groups of neighbouring channels, (B, k channels, H, W) to (B, channels, H, W) (DC-AE, section 3.1)."""
    if x.shape[1] == channels:
        return x
    return x.movedim(1, -1).unflatten(-1, (channels, -1)).mean(-1).movedim(-1, 1)


def repeat_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Each channel several times in a row, (B, channels / k, H, W) to (B, channels, H, W) (DC-AE, section 3.1)."""
    if x.shape[1] == channels:
        return x
    return x.movedim(1, -1).repeat_interleave(channels // x.shape[1], dim=-1).movedim(-1, 1)


def space_to_channels(x: torch.Tensor) -> torch.Tensor:
    """(B, C, 2H, 2W) to (B, 4C, H, W): `F.pixel_unshuffle`, which would leave channels-last memory."""
    batch, channels, height, width = x.shape
    cells = x.movedim(1, -1).reshape(batch, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return cells.permute(0, 1, 3, 5, 2, 4).flatten(3).movedim(-1, 1)


def channels_to_space(x: torch.Tensor) -> torch.Tensor:
    """(B, 4C, H, W) to (B, C, 2H, 2W): `F.pixel_shuffle`, which would leave channels-last memory."""
    cells = x.movedim(1, -1).unflatten(-1, (-1, FACTOR, FACTOR))  # B H W C 2 2
    return cells.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class DCDownBlock2d(nn.Module):
    """Half the resolution: a strided convolution, or one followed by space-to-channels; shortcut by averaging."""

    def __init__(self, in_channels: int, out_channels: int, unshuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        if unshuffle and out_channels % FACTOR**2:
            raise ValueError(
                f"out_channels must be a multiple of {FACTOR**2} to be unshuffled into, got {out_channels}"
            )
        self.unshuffle = unshuffle
        self.shortcut = shortcut
        self.out_channels = out_channels
        self.conv = nn.Conv2d(
            in_channels,
            out_channels // FACTOR**2 if unshuffle else out_channels,
            kernel_size=3,
            stride=1 if unshuffle else FACTOR,
            padding=1,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.unshuffle:
            y = space_to_channels(y)
        return y + average_channels(space_to_channels(x), self.out_channels) if self.shortcut else y


class DCUpBlock2d(nn.Module):
    """Double the resolution: nearest neighbour and a convolution, or a convolution and channels-to-space.

    The shortcut repeats channels and shuffles them into space.
    """

    def __init__(self, in_channels: int, out_channels: int, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.shortcut = shortcut
        self.out_channels = out_channels
        self.conv = nn.Conv2d(
            in_channels, out_channels if interpolate else out_channels * FACTOR**2, kernel_size=3, padding=1
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=FACTOR, mode="nearest"))
        else:
            y = channels_to_space(self.conv(x))
        return y + channels_to_space(repeat_channels(x, self.out_channels * FACTOR**2)) if self.shortcut else y
