"""Images to images of the same size: the two kinds of block that encoder and decoder are made of.

B batch, C channels, H W grid, N = H*W, D inner width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sana_sprint.autoencoder.inner import InnerConv2d, convolve
from sana_sprint.layers.attention import linear_attention
from sana_sprint.layers.feed_forward import GLUMBConv
from sana_sprint.layers.norms import channel_norm

# Of what heads are made of that attend at once: 64 MiB in the float32 that attention computes in.
MAX_NUMBERS_AT_ONCE = 2**24

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU}


def activation(name: str) -> nn.Module:
    """The activation that a config names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]()


class ResBlock(nn.Module):
    """Two 3x3 convolutions with an activation between, a norm, and the input added."""

    def __init__(self, channels: int, norm_type: str, act_fn: str) -> None:
        super().__init__()
        self.nonlinearity = activation(act_fn)
        self.conv1 = InnerConv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = InnerConv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = channel_norm(norm_type, channels)

    def forward(self, x: torch.Tensor, inner: bool = False) -> torch.Tensor:
        """(B, C, H, W) to the same, or with `inner` without the two rows at either end: (B, C, H - 4, W)."""
        # In one expression, for a name would keep what has been read in memory.
        y = self.norm(convolve(self.conv2, self.nonlinearity(convolve(self.conv1, x, inner)), inner))
        return (x[:, :, 2:-2] if inner else x) + y


class MultiscaleProjection(nn.Module):
    """Query, key and value gathered from a neighbourhood: a depthwise convolution, then one matrix per head."""

    def __init__(self, inner_dim: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        channels = 3 * inner_dim
        self.proj_in = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1, groups=3 * num_heads, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.proj_in(x))


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention whose extra heads look through larger kernels (EfficientViT), with the input added.

    The three projections are thirds of one matrix, not query, key and value: their concatenated output is split per
    head into blocks of 3 `head_dim` (query, key, value), as the published weights demand.
    """

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm_type: str) -> None:
        super().__init__()
        num_heads = channels // head_dim
        inner_dim = num_heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, inner_dim, bias=False)
        self.to_k = nn.Linear(channels, inner_dim, bias=False)
        self.to_v = nn.Linear(channels, inner_dim, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            MultiscaleProjection(inner_dim, num_heads, kernel_size) for kernel_size in kernel_sizes
        )
        self.to_out = nn.Linear(inner_dim * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = channel_norm(norm_type, channels)

    def attended_heads(self, x: torch.Tensor) -> torch.Tensor:
        """What the heads read from (B, C, H, W): (B, N, heads, d), those of the larger kernels last."""
        pixels = x.movedim(1, -1)  # B H W C
        thirds = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1)  # B H W 3D
        scales = [thirds, *(scale(thirds.movedim(-1, 1)).movedim(1, -1) for scale in self.to_qkv_multiscale)]
        heads = [scale.flatten(1, 2).unflatten(-1, (-1, 3, self.head_dim)) for scale in scales]  # B N heads 3 d
        at_once = max(MAX_NUMBERS_AT_ONCE // heads[0][:, :, 0].numel(), 1)
        parts = [part for some in heads for part in some.split(at_once, dim=2)]
        return torch.cat([linear_attention(*part.unbind(3)) for part in parts], dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attended_heads(x).flatten(2).unflatten(1, x.shape[-2:])  # B H W D'
        return x + self.norm_out(self.to_out(attended).movedim(-1, 1))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention for the context, a gated mix-FFN for the detail."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm_type: str) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes, norm_type)
        self.conv_out = GLUMBConv(channels, channels, norm_type="rms_norm")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.attn(x))


def make_block(
    block_type: str, channels: int, head_dim: int, norm_type: str, act_fn: str, kernel_sizes: Sequence[int]
) -> nn.Module:
    """The block that a config names: "ResBlock" or "EfficientViTBlock"."""
    if block_type == "ResBlock":
        return ResBlock(channels, norm_type, act_fn)
    if block_type == "EfficientViTBlock":
        return EfficientViTBlock(channels, head_dim, kernel_sizes, norm_type)
    raise ValueError(f'block type must be "ResBlock" or "EfficientViTBlock", got {block_type!r}')
