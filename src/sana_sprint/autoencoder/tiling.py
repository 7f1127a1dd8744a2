"""A network and a large image to nearly its result in bounded memory: tile by tile, blended where tiles overlap."""

from collections.abc import Callable
from fractions import Fraction

import torch


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles of length `tile` begin, at most `stride` apart, so that the last one ends at `size` exactly."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, stride), size - tile]


def blending_weights(starts: list[int], tile: int, size: int) -> torch.Tensor:
    """One weight per tile and position, (tiles, min(tile, size)), float32.

    Linear ramps where a tile overlaps its neighbours; at every position the weights of all tiles sum to 1.
    """
    length = min(tile, size)
    positions = torch.arange(length, dtype=torch.float32)
    weights = torch.ones(len(starts), length)
    for index in range(1, len(starts)):
        overlap = starts[index - 1] + length - starts[index]
        # Half-integer ramp: no tile's edge gets the weight 0 or 1 exactly, both sides are used alike.
        ramp = ((positions + 0.5) / overlap).clamp(max=1) if overlap > 0 else torch.ones(length)
        weights[index] *= ramp
        weights[index - 1] *= ramp.flip(0)
    total = torch.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + length] += weight
    return torch.stack([w / total[s : s + length] for s, w in zip(starts, weights, strict=True)])


def apply_tiled(
    network: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: tuple[int, int],
    stride: tuple[int, int],
    scale: Fraction,
) -> torch.Tensor:
    """Run `network` on overlapping tiles of `x` (B, C, H, W) and blend the results.

    Args:
        network: maps (B, C, h, w) to (B, C', scale h, scale w).
        tile, stride: height and width of a tile and the most that neighbours are apart, in cells of `x`. Positions
            and sizes times `scale` must be whole numbers.
        scale: cells of the result per cell of `x`, and axis.

    Returns:
        (B, C', scale H, scale W): every part of it comes from a tile, whatever the sizes.
    """
    height, width = x.shape[-2:]
    rows, columns = tile_starts(height, tile[0], stride[0]), tile_starts(width, tile[1], stride[1])
    out_height, out_width = int(height * scale), int(width * scale)
    row_weights, column_weights = (
        blending_weights([int(start * scale) for start in starts], int(length * scale), size).to(x.device)
        for starts, length, size in ((rows, tile[0], out_height), (columns, tile[1], out_width))
    )
    result: torch.Tensor | None = None
    for row, row_weight in zip(rows, row_weights, strict=True):
        for column, column_weight in zip(columns, column_weights, strict=True):
            part = network(x[:, :, row : row + tile[0], column : column + tile[1]])
            if result is None:
                result = part.new_zeros(part.shape[0], part.shape[1], out_height, out_width)
            top, left = int(row * scale), int(column * scale)
            weight = (row_weight[:, None] * column_weight[None]).to(part.dtype)
            result[:, :, top : top + part.shape[2], left : left + part.shape[3]] += part * weight
    assert result is not None
    return result
