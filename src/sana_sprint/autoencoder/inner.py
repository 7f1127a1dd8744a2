"""Images to convolved images, whole or without the rows at either end that a strip of a larger image throws away.

B batch, C channels, H W grid.
"""

import torch
import torch.nn.functional as F
from torch import nn

from sana_sprint.autoencoder.winograd import winograd_conv2d, winograd_pays


class InnerConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 that can leave out its first and last row, the only ones it pads rows for.

    Constructed with `nn.Conv2d`'s own parameters, for PEFT makes its adapters with the class of what they adapt.
    """

    def forward(self, x: torch.Tensor, inner: bool = False) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H, W), or with `inner` to (B, C', H - 2, W)."""
        if winograd_pays(x, self.weight, self.bias, inner):
            return winograd_conv2d(x, self.weight, self.bias, inner)
        return F.conv2d(x, self.weight, self.bias, padding=(0, 1)) if inner else super().forward(x)


def convolve(conv: nn.Module, x: torch.Tensor, inner: bool) -> torch.Tensor:
    """`conv(x)`, with `inner` without its first and last row, which all but an `InnerConv2d` compute and throw away."""
    if not inner:
        return conv(x)
    return conv(x, inner=True) if isinstance(conv, InnerConv2d) else conv(x)[:, :, 1:-1]
