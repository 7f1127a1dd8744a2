"""Channels-last images to images of the same size: the gated depthwise mix-FFN of transformer and autoencoder.

B batch, C channels, H W grid.
"""

import torch
import torch.nn.functional as F
from torch import nn

from sana_sprint.layers.norms import ChannelRMSNorm


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution computed as the matrix product it is; weights keep a convolution's keys and shape.

    Constructed with `nn.Conv2d`'s own parameters, for PEFT makes its adapters with the class of what they adapt.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class GLUMBConv(nn.Module):
    """Inverted bottleneck with a gated depthwise 3x3 convolution (SANA, section 2.2: mix-FFN).

    (B, C, H, W) in channels-last memory to the same. `norm_type` "rms_norm" normalises the result over channels (the
    autoencoder's form); `residual_connection` adds the input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: float = 4,
        norm_type: str | None = None,
        residual_connection: bool = True,
    ) -> None:
        super().__init__()
        if norm_type not in (None, "rms_norm"):
            raise ValueError(f'norm_type must be None or "rms_norm", got {norm_type!r}')
        hidden_channels = int(expand_ratio * in_channels)
        self.residual_connection = residual_connection
        self.conv_inverted = PointwiseConv2d(in_channels, hidden_channels * 2, kernel_size=1)
        self.conv_depth = nn.Conv2d(
            hidden_channels * 2, hidden_channels * 2, kernel_size=3, padding=1, groups=hidden_channels * 2
        )
        self.conv_point = PointwiseConv2d(hidden_channels, out_channels, kernel_size=1, bias=False)
        self.norm = ChannelRMSNorm(out_channels) if norm_type == "rms_norm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_depth(F.silu(self.conv_inverted(x)))
        value, gate = hidden.chunk(2, dim=1)
        y = self.conv_point(value * F.silu(gate))
        if self.norm is not None:
            y = self.norm(y)
        return x + y if self.residual_connection else y
