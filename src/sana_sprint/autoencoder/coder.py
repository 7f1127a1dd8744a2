"""Pixels (B, 3, H, W) to latents (B, C, H / r, W / r) and back: the two halves of DC-AE.

Stage k works at 1 / 2^k of the resolution. A stage 0 without layers is left out: the stem or head resamples instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from sana_sprint.autoencoder.blocks import activation, make_block
from sana_sprint.autoencoder.resample import DCDownBlock2d, DCUpBlock2d, average_channels, repeat_channels
from sana_sprint.autoencoder.strips import apply_in_strips
from sana_sprint.layers.gradients import needs_gradient
from sana_sprint.layers.norms import ChannelRMSNorm

T = TypeVar("T")


def per_stage(value: T | Sequence[T], num_stages: int) -> tuple[T, ...]:
    """A config's single value for all stages, or its value per stage."""
    return (value,) * num_stages if isinstance(value, str) else tuple(value)  # type: ignore[return-value,arg-type]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution: its width, and the blocks that work at it."""

    channels: int
    num_layers: int
    block_type: str
    norm_type: str
    act_fn: str
    kernel_sizes: tuple[int, ...]

    def blocks(self, head_dim: int) -> Iterator[nn.Module]:
        for _ in range(self.num_layers):
            yield make_block(self.block_type, self.channels, head_dim, self.norm_type, self.act_fn, self.kernel_sizes)


class Coder(nn.Module):
    """What encoder and decoder share: how they run their stages."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor] | None = None  # set by diffusers with the switch

    def run_stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`stage(x)`; with gradient checkpointing its blocks one by one, recomputed in the backward pass."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        assert self._gradient_checkpointing_func is not None
        for block in stage.children():
            x = self._gradient_checkpointing_func(block, x)
        return x

    def can_stream(self, x: torch.Tensor) -> bool:
        """Whether strips give what the whole would: nothing is to be differentiated, no graph is being compiled."""
        if torch.compiler.is_compiling():
            return False  # every strip would be a copy of the network in the graph
        return not needs_gradient(chain((x,), self.parameters()))


class Encoder(Coder):
    """Pixels to latents: stem, stages with a down block after each, and a projection with an averaging shortcut."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        stages: Sequence[Stage],
        head_dim: int,
        unshuffle: bool,
        out_shortcut: bool,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.out_shortcut = out_shortcut
        if stages[0].num_layers > 0:
            self.conv_in: nn.Module = nn.Conv2d(in_channels, stages[0].channels, kernel_size=3, padding=1)
        else:
            self.conv_in = DCDownBlock2d(in_channels, stages[1].channels, unshuffle, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for index, stage in enumerate(stages):
            blocks = list(stage.blocks(head_dim))
            if blocks and index + 1 < len(stages):
                blocks.append(DCDownBlock2d(stage.channels, stages[index + 1].channels, unshuffle))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(stages[-1].channels, latent_channels, kernel_size=3, padding=1)

    def forward(self, pixels: torch.Tensor, strip_rows: int | None = None) -> torch.Tensor:
        """Pixels to latents; with `strip_rows` the local layers work on strips of so many rows where they can."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        if strip_rows is not None and self.can_stream(x):
            blocks = [block for stage in self.down_blocks for block in stage.children()]
            x = apply_in_strips([self.conv_in, *blocks], x, strip_rows)
        else:
            x = self.conv_in(x)
            for stage in self.down_blocks:
                x = self.run_stage(stage, x)
        latents = self.conv_out(x)
        if self.out_shortcut:
            # With a device map the projection may live on another device than the last block.
            latents = latents + average_channels(x, self.latent_channels).to(latents.device)
        return latents


class Decoder(Coder):
    """Latents to pixels: a projection with a repeating shortcut, stages with an up block before each, and a head."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        stages: Sequence[Stage],
        head_dim: int,
        interpolate: bool,
        in_shortcut: bool,
        act_fn: str,
    ) -> None:
        super().__init__()
        self.in_shortcut = in_shortcut
        self.conv_in = nn.Conv2d(latent_channels, stages[-1].channels, kernel_size=3, padding=1)
        self.up_blocks = nn.ModuleList()
        for index, stage in enumerate(stages):
            blocks = list(stage.blocks(head_dim))
            if blocks and index + 1 < len(stages):
                blocks.insert(0, DCUpBlock2d(stages[index + 1].channels, stage.channels, interpolate))
            self.up_blocks.append(nn.Sequential(*blocks))
        has_full_resolution = stages[0].num_layers > 0
        channels = stages[0].channels if has_full_resolution else stages[1].channels
        self.norm_out = ChannelRMSNorm(channels)
        self.conv_act = activation(act_fn)
        if has_full_resolution:
            self.conv_out: nn.Module = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)
        else:
            self.conv_out = DCUpBlock2d(channels, out_channels, interpolate, shortcut=False)

    def forward(self, latents: torch.Tensor, strip_rows: int | None = None) -> torch.Tensor:
        """Latents to pixels; with `strip_rows` the local layers work on strips of so many rows where they can."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(latents)
        if self.in_shortcut:
            # With a device map the decoder may live on another device than the caller's latents.
            x = x + repeat_channels(latents, x.shape[1]).to(x.device)
        if strip_rows is not None and self.can_stream(latents):
            blocks = [block for stage in reversed(self.up_blocks) for block in stage.children()]
            return apply_in_strips([*blocks, self.norm_out, self.conv_act, self.conv_out], x, strip_rows)
        for stage in reversed(self.up_blocks):
            x = self.run_stage(stage, x)
        return self.conv_out(self.conv_act(self.norm_out(x)))
