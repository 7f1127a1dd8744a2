"""Tensors to normalised and modulated tensors: RMS norms over the last axis or over channels.

B batch, C channels, H W grid, D width.
"""

import torch
from torch import nn

from sana_sprint.layers.gradients import needs_gradient

# Of what a CPU normalises at once: 1 MiB in float32. Intermediate results of this size stay in its cache, and are not
# taken anew from the system each time.
MAX_NUMBERS_AT_ONCE = 2**18


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    # The mean of squares needs float32: bfloat16 keeps 8 bits, and a sum over D terms loses most of them.
    full = x.float()
    y = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Divide `x` (..., D) by the root mean square over its last axis, then scale and shift; dtype of `x` is kept."""
    fits = x.device.type != "cpu" or x.numel() <= MAX_NUMBERS_AT_ONCE
    if fits or needs_gradient((x, weight, bias)) or torch.compiler.is_compiling():
        return _rms_norm(x, weight, bias, eps)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows_at_once = max(MAX_NUMBERS_AT_ONCE // x.shape[-1], 1)
    rows, results = (t.view(-1, x.shape[-1]).split(rows_at_once) for t in (x.contiguous(), y))
    for row, result in zip(rows, results, strict=True):
        result.copy_(_rms_norm(row, weight, bias, eps))
    return y


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive scale and shift of normalised tokens: x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019), learned scale, optional bias."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class ChannelRMSNorm(RMSNorm):
    """The same norm over the channels of (B, C, H, W); on channels-last memory nothing is moved."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def channel_norm(kind: str, channels: int) -> nn.Module:
    """The norm that a config names, over the channels of (B, C, H, W): "rms_norm" or "batch_norm"."""
    if kind == "rms_norm":
        return ChannelRMSNorm(channels)
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels)
    raise ValueError(f'norm type must be "rms_norm" or "batch_norm", got {kind!r}')


class SanaModulatedNorm(nn.Module):
    """The last norm: LayerNorm without parameters, modulated by a (2, D) table plus the time embedding."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)

    def forward(self, tokens: torch.Tensor, time_embedding: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        # With a device map the table may live on another device than the embedding.
        shift, scale = (table[None] + time_embedding[:, None].to(table.device)).chunk(2, dim=1)  # B 1 D each
        return modulate(self.norm(tokens), shift, scale)
