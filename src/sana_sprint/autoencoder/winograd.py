"""An image to its 3x3 convolution by 4/9 of the products: Winograd's F(2x2, 3x3) (Lavin and Gray 2016, 1509.09308).

B batch, C channels, C' channels of the result, H W grid; H' W' the same in tiles of 2x2 results.

Two neighbouring results of a kernel g0 g1 g2 on values d0 d1 d2 d3 take four products instead of six:

    m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    m3 = (d1 - d3) g2
    d0 g0 + d1 g1 + d2 g2 = m0 + m1 + m2                      d1 g0 + d2 g1 + d3 g2 = m1 - m2 - m3

Along rows and columns, 2x2 results take 16 instead of 36. With all channels these are 16 matrix products.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from sana_sprint.layers.gradients import needs_gradient

TILE = 2  # results, in each direction
PRODUCTS = 4  # that they take, in each direction

# Pixels times channels of a block of rows. Its factors, products and sums take 20 MiB in bfloat16.
MAX_NUMBERS_AT_ONCE = 2**20

# Strips of 64 rows of a picture of 768. On two cores of an AMD EPYC (Zen 5) a convolution of 512 channels gained from
# less than that on; one of 256 hardly, but a whole decode of 1024 did with both (docs/speed.md).
MIN_CHANNELS = 256
MIN_NUMBERS = 6 * 2**20  # pixels times channels


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in vectors, and not in tiles (AMX), with which this has not been measured."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False  # an older torch does not say
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def winograd_pays(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, inner: bool) -> bool:
    """Whether `winograd_conv2d` can take the place of the plain form for a convolution of padding 1, and is faster.

    For bfloat16 on a CPU alone: products of float32 gained less than the sums cost, and a GPU's library has its own.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or x.ndim != 4:
        return False
    _, channels, height, width = x.shape
    rows = height - 2 if inner else height
    return (
        all(tensor.dtype == torch.bfloat16 for tensor in (x, weight, bias) if tensor is not None)
        and weight.shape[1:] == (channels, 3, 3)  # an adapter's second convolution is 1x1
        and min(channels, len(weight)) >= MIN_CHANNELS
        and channels * rows * width >= MIN_NUMBERS
        and rows % TILE == 0
        and width % TILE == 0
        and not needs_gradient((x, weight, bias))
        and multiplies_bfloat16()
    )


def _sum_values(values: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """The left factors of 2n results, of 2n + 2 values along `dim`: to `out` (4, ..., n, ...)."""
    even, odd = values.unflatten(dim, (-1, TILE)).unbind(dim + 1)
    count = even.shape[dim] - 1
    d0, d1, d2, d3 = (of_tiles.narrow(dim, start, count) for start in (0, 1) for of_tiles in (even, odd))
    torch.sub(d0, d2, out=out[0])
    torch.add(d1, d2, out=out[1])
    torch.sub(d2, d1, out=out[2])
    torch.sub(d1, d3, out=out[3])


def _sum_weights(weights: torch.Tensor) -> torch.Tensor:
    """The right factors, of weights along the first axis: (3, ...) to (4, ...)."""
    ends, middle = (weights[0] + weights[2]) / 2, weights[1] / 2
    return torch.stack([weights[0], ends + middle, ends - middle, weights[2]])


def _sum_products(products: torch.Tensor, out: torch.Tensor) -> None:
    """The results, of products (4, ...): to `out` (2, ...)."""
    torch.add(products[0], products[1], out=out[0]).add_(products[2])
    torch.sub(products[1], products[2], out=out[1]).sub_(products[3])


def _kernel_factors(weight: torch.Tensor) -> torch.Tensor:
    """The right factors of both directions, the second within the first: (C', C, 3, 3) to (16, C, C')."""
    by_row = _sum_weights(weight.float().permute(2, 3, 0, 1))  # 4 3 C' C
    return _sum_weights(by_row.movedim(1, 0)).flatten(0, 1).to(weight.dtype).transpose(1, 2)


def _front(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first numbers of a flat `buffer`, in this shape."""
    return buffer[: math.prod(shape)].view(shape)


def winograd_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, inner: bool = False
) -> torch.Tensor:
    """`F.conv2d` with padding 1, or with `inner` without the first and last row of its result. Without gradients.

    Equal up to rounding, here of the sums too: for normal values and weights an error of 0.7 % in bfloat16, four times
    that of the plain form. Blocks of rows are computed one after the other, in the same memory.

    Args:
        x: (B, C, H, W), with an even W.
        weight: (C', C, 3, 3). Its sums are made anew at each call: kept, they would be 16/9 of the weights in memory,
            and could become stale.

    Returns:
        (B, C', H, W), or with `inner` (B, C', H - 2, W), in channels-last memory; this height must be even.
    """
    batch, channels, height, width = x.shape
    padding = 0 if inner else 1
    result = x.new_empty(batch, height + 2 * padding - 2, width, len(weight))
    kernel = _kernel_factors(weight)
    per_row = width * max(channels, len(weight))
    rows = min(max(MAX_NUMBERS_AT_ONCE // (TILE * per_row), 1) * TILE, result.shape[1])
    # The factors along rows lie where the products will.
    for_values, for_products, for_sums = (x.new_empty(count * rows * per_row) for count in (PRODUCTS, PRODUCTS, TILE))
    for image, image_result in zip(x.movedim(1, -1), result, strict=True):  # H W C
        for top in range(0, len(image_result), rows):
            block = image_result[top : top + rows]
            tiles = (len(block) // TILE, width // TILE)  # H' W'
            first, last = top - padding, top - padding + len(block) + 2
            seen = image[max(first, 0) : last]
            if len(seen) < len(block) + 2:
                seen = F.pad(seen, (0, 0, 0, 0, max(-first, 0), max(last - height, 0)))
            by_row = _front(for_products, PRODUCTS, tiles[0], width + 2, channels)
            by_row[:, :, :: width + 1] = 0  # the padding
            _sum_values(seen, 0, out=by_row[:, :, 1:-1])
            values = _front(for_values, PRODUCTS, PRODUCTS, *tiles, channels)  # 4 of columns, 4 of rows, H' W' C
            _sum_values(by_row, 2, out=values)
            products = _front(for_products, PRODUCTS, PRODUCTS, *tiles, len(weight))
            torch.bmm(values.flatten(2, 3).flatten(0, 1), kernel, out=products.flatten(2, 3).flatten(0, 1))
            if bias is not None:
                products[1, 1] += bias  # the one product that every result has, and has with a plus
            by_column = _front(for_sums, TILE, PRODUCTS, *tiles, len(weight))
            _sum_products(products, out=by_column)
            cells = block.view(tiles[0], TILE, tiles[1], TILE, -1).permute(1, 3, 0, 2, 4)  # 2 of rows, 2 of columns
            _sum_products(by_column.movedim(1, 0), out=cells)
    return result.movedim(-1, 1)
