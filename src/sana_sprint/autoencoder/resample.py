"""Images at one resolution to the next, half or double, with shortcuts that carry every value across without weights.

B batch, C channels, H W grid. All in channels-last memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from sana_sprint.autoencoder.inner import InnerConv2d, convolve
from sana_sprint.layers.gradients import needs_gradient

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


def repeat_into_space(x: torch.Tensor, channels: int) -> torch.Tensor:
    """`channels_to_space` of the channels repeated to 4 `channels`, as cells (B, H, 2, W, 2, `channels`).

    A view where the repeats are 1, 2 or 4: those stay within a cell.
    """
    within_cell = math.gcd(channels * FACTOR**2 // x.shape[1], FACTOR**2)
    own = FACTOR**2 // within_cell  # values of its own that a cell has per channel
    rows = min(own, FACTOR)
    pixels = repeat_channels(x, channels * own).movedim(1, -1).unflatten(-1, (channels, rows, own // rows))
    return pixels.expand(-1, -1, -1, -1, FACTOR, FACTOR).permute(0, 1, 4, 2, 5, 3)


def nearest_double(x: torch.Tensor, inner: bool) -> torch.Tensor:
    """Each pixel four times, (B, C, H, W) to (B, C, 2H, 2W), or with `inner` without the first and last row."""
    y = F.interpolate(x, scale_factor=FACTOR, mode="nearest")
    return y[:, :, 1:-1] if inner else y


class DoublingConv2d(InnerConv2d):
    """A 3x3 convolution with padding 1, of an image or of its nearest-neighbour double, which is then not made.

    The double repeats each pixel, so the kernel meets it with the sum of neighbouring weights: a transposed convolution
    of stride 2 whose 4x4 kernel holds the sums over windows of 2x2. It takes 4/9 of the operations. The sums are made
    anew at each call, which costs as much as some hundred pixels: kept, they could become stale or stay on a device
    that the weights have left, and would be 16/9 of the weights in memory.
    """

    def forward(self, x: torch.Tensor, inner: bool = False, doubled: bool = False) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H, W), or with `doubled` to (B, C', 2H, 2W).

        With `inner` without what stands for the first and last row of `x`: one row each, of the double two.
        """
        if not doubled:
            return super().forward(x, inner)
        if needs_gradient((x, *self.parameters())):
            return super().forward(nearest_double(x, inner), inner)
        # Channels-last, for the library would take longer to rearrange the sums than to make them.
        kernel = self.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        sums = F.avg_pool2d(kernel, FACTOR, stride=1, padding=1, divisor_override=1)
        cut = 1 + FACTOR if inner else 1  # rows of the result, for that is what a transposed convolution's padding is
        return F.conv_transpose2d(x, sums, self.bias, stride=FACTOR, padding=(cut, 1))


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
        self.conv = (
            DoublingConv2d(in_channels, out_channels, kernel_size=3, padding=1)
            if interpolate
            else InnerConv2d(in_channels, out_channels * FACTOR**2, kernel_size=3, padding=1)
        )

    def forward(self, x: torch.Tensor, inner: bool = False) -> torch.Tensor:
        """(B, C, H, W) to (B, C', 2H, 2W), or with `inner` without the two rows at either end: (B, C', 2H - 4, 2W)."""
        if not self.interpolate:
            y = channels_to_space(convolve(self.conv, x, inner))
        elif isinstance(self.conv, DoublingConv2d):
            y = self.conv(x, inner, doubled=True)
        else:  # an adapter around it, which sees what it would around a plain convolution
            y = convolve(self.conv, nearest_double(x, inner), inner)
        if not self.shortcut:
            return y
        cells = y.movedim(1, -1).unflatten(2, (-1, FACTOR)).unflatten(1, (-1, FACTOR))  # B H 2 W 2 C
        carried = repeat_into_space(x[:, :, 1:-1] if inner else x, self.out_channels)
        return (cells + carried).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
