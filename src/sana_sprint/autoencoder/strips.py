"""A row of layers and a large image to exactly their result in bounded memory: strip by strip where layers are local.

B batch, C channels, H W grid.

An image comes as consecutive strips of rows. A local layer keeps of each strip the few rows that its neighbour needs,
so nothing is approximated and little is computed twice. A layer pads with zeros where the image ends. Within the image,
residual and upsampling blocks leave out the rows that padding would spoil; of other layers these are thrown away.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import groupby

import torch
from torch import nn

from sana_sprint.autoencoder.blocks import ACTIVATIONS, EfficientViTBlock, ResBlock
from sana_sprint.autoencoder.resample import FACTOR, DCDownBlock2d, DCUpBlock2d
from sana_sprint.layers.feed_forward import GLUMBConv
from sana_sprint.layers.norms import ChannelRMSNorm

# What sees of an image one pixel at a time.
POINTWISE: tuple[type[nn.Module], ...] = (ChannelRMSNorm, *ACTIVATIONS.values())

# What can leave out the rows that a strip within the image would throw away: its forward takes `inner`.
LEAVES_OUT = (ResBlock, DCUpBlock2d)


def halo_of(layer: nn.Module) -> int | None:
    """How many rows of its input a layer sees beyond what it computes, on either side; None: more than can be said."""
    if isinstance(layer, POINTWISE):
        return 0
    if isinstance(layer, nn.BatchNorm2d):
        return None if layer.training else 0  # in training its statistics are those of the image
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size[0] // 2
    if isinstance(layer, ResBlock | GLUMBConv):
        halos = [halo_of(child) for child in layer.children()]
        return None if None in halos else sum(halo for halo in halos if halo)
    if isinstance(layer, DCUpBlock2d | DCDownBlock2d):
        halo = halo_of(layer.conv)
        if halo is None or (isinstance(layer, DCUpBlock2d) and not layer.interpolate):
            return halo
        cells = -(-halo // FACTOR)  # the convolution is on the finer grid: of two rows each, rounded up
        return cells if isinstance(layer, DCUpBlock2d) else cells * FACTOR
    return None


def scale_of(layer: nn.Module) -> Fraction:
    """Rows that a layer gives for each row that it gets."""
    if isinstance(layer, DCUpBlock2d):
        return Fraction(FACTOR)
    return Fraction(1, FACTOR) if isinstance(layer, DCDownBlock2d) else Fraction(1)


def _stream(layer: nn.Module, strips: Iterable[torch.Tensor], height: int, rows: int) -> Iterator[torch.Tensor]:
    """`layer`'s result strip by strip, of at most `rows` rows each, for consecutive strips of `height` rows in all."""
    halo, scale = halo_of(layer), scale_of(layer)
    assert halo is not None
    step = scale.denominator
    most = max(int(rows / scale), step)
    least = most if scale < 1 else 1  # else strips would become thinner at every resolution, and halos a larger share
    window: torch.Tensor | None = None
    top = done = 0  # in rows of the input: where the window begins, and up to where the result has been given
    for strip in strips:
        window = strip if window is None else torch.cat([window, strip], dim=2)
        del strip
        end = top + window.shape[2]
        ready = height if end == height else (end - halo) // step * step
        while ready - done >= (1 if end == height else least):
            stop = min(done + most, ready)
            kept = max(stop - halo, 0)
            given = [window[:, :, : min(stop + halo, end) - top]]
            inner = isinstance(layer, LEAVES_OUT) and done >= halo and stop + halo <= end
            within = slice(int((done - top) * scale), int((stop - top) * scale))
            window = window[:, :, kept - top :].clone()
            top, done = kept, stop
            # Popped, so that what is given away is not kept alive here until the next strip is asked for.
            yield layer(given.pop(), inner=True) if inner else layer(given.pop())[:, :, within]


def _join(strips: Iterable[torch.Tensor], height: int) -> torch.Tensor:
    """Consecutive strips of an image of `height` rows to the image (B, C, H, W), in channels-last memory."""
    image: torch.Tensor | None = None
    top = 0
    for strip in strips:
        batch, channels, count, width = strip.shape
        if image is None:
            image = torch.empty(
                (batch, channels, height, width),
                dtype=strip.dtype,
                device=strip.device,
                memory_format=torch.channels_last,
            )
        image[:, :, top : top + count] = strip
        top += count
        del strip
    assert image is not None
    assert top == height
    return image


def apply_in_strips(layers: Iterable[nn.Module], x: torch.Tensor, rows: int) -> torch.Tensor:
    """The result of `layers`, one after the other, for `x` (B, C, H, W); the local among them in strips.

    A layer that is not local gets and gives whole images; local ones in a row pass on strips of at most `rows` rows, at
    every resolution. Without gradients. Equal up to rounding: convolutions and means sum otherwise for fewer rows.

    Args:
        layers: EfficientViT blocks are taken apart: their attention is not local, their feed-forward is.
        rows: of a strip, at least 1. Memory grows with it; the share of what is computed twice falls.
    """
    parts = [
        part for layer in layers for part in (layer.children() if isinstance(layer, EfficientViTBlock) else [layer])
    ]
    for is_local, run in groupby(parts, key=lambda part: halo_of(part) is not None):
        if not is_local:
            for layer in run:
                x = layer(x)
            continue
        strips: Iterable[torch.Tensor] = iter(x.split(rows, dim=2))
        height = x.shape[2]
        for layer in run:
            strips = _stream(layer, strips, height, rows)
            height = int(height * scale_of(layer))
        x = _join(strips, height)
    return x
