"""A 3x3 convolution with 4/9 of the multiplications: Winograd's F(2x2, 3x3) (Lavin and Gray 2016, arXiv:1509.09308).

B batch, C channels in, O channels out, H W grid, h w the same in tiles of 2x2 results.

Two neighbouring results of a kernel g0 g1 g2 on values d0 d1 d2 d3 take four products instead of six:

    m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    m3 = (d1 - d3) g2
    d0 g0 + d1 g1 + d2 g2 = m0 + m1 + m2                      d1 g0 + d2 g1 + d3 g2 = m1 - m2 - m3

Along rows and columns, 2x2 results take 16 instead of 36. With all channels these are 16 matrix products.
"""

import math

import torch
import torch.nn.functional as F

from sana_sprint.layers.gradients import needs_gradient

SIDE = 2  # of a tile of results
FACTORS = 4  # products for such a tile, in each direction

# Pixels times channels of a block of rows, for which four times as many numbers are multiplied: 8 MiB in bfloat16.
MAX_NUMBERS_AT_ONCE = 2**20

# Below these the sums take longer than the products that they save.
MIN_CHANNELS = 256
MIN_NUMBERS = 6 * 2**20  # pixels times channels


def _multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in vectors. With tiles (AMX) it is much faster; not tried there."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False  # torch before 2.10 does not say
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def winograd_pays(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, inner: bool) -> bool:
    """Whether `winograd_conv2d` can take the place of the plain form here, and is faster.

    Not for float32, whose products gained less than the sums cost, nor for a GPU, whose library chooses for itself.
    """
    _, channels, height, width = x.shape
    height -= 2 if inner else 0
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and min(channels, len(weight)) >= MIN_CHANNELS
        and channels * height * width >= MIN_NUMBERS
        and height % SIDE == 0
        and width % SIDE == 0
        and not torch.compiler.is_compiling()
        and not needs_gradient(x, weight, bias)
        and _multiplies_bfloat16()
    )


def _sum_data(d: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """The left factors, of `d` along `dim`, where it has 2n + 2 values: to `out` (4, ..., n, ...)."""
    even, odd = d.unflatten(dim, (-1, SIDE)).unbind(dim + 1)
    n = even.shape[dim] - 1
    d0, d1, d2, d3 = (t.narrow(dim, start, n) for start in (0, 1) for t in (even, odd))
    torch.sub(d0, d2, out=out[0])
    torch.add(d1, d2, out=out[1])
    torch.sub(d2, d1, out=out[2])
    torch.sub(d1, d3, out=out[3])


def _sum_kernel(g: torch.Tensor) -> torch.Tensor:
    """The right factors, of `g` along its first axis: (3, ...) to (4, ...)."""
    ends, middle = (g[0] + g[2]) / 2, g[1] / 2
    return torch.stack([g[0], ends + middle, ends - middle, g[2]])


def _sum_products(m: torch.Tensor, out: torch.Tensor) -> None:
    """The results, of products `m` (4, ...): to `out` (2, ...)."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _front(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first numbers of a flat `buffer`, in this shape."""
    return buffer[: math.prod(shape)].view(shape)


def winograd_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, inner: bool = False
) -> torch.Tensor:
    """`F.conv2d` with padding 1, or with `inner` without the first and last row of its result. Without gradients.

    Equal up to rounding, here that of the sums too: in bfloat16 an error of 0.7 %, four times that of the plain form.
    Blocks of rows are computed one after the other in the same memory, which a processor's cache holds.

    Args:
        x: (B, C, H, W), with an even width. In channels-last memory, as the result is.
        weight: (O, C, 3, 3). Its sums are made anew at each call: kept, they would be 16/9 of the weights in memory,
            and could become stale.

    Returns:
        (B, O, H, W), or with `inner` (B, O, H - 2, W); this height must be even.
    """
    x = x if inner else F.pad(x, (0, 0, 1, 1))
    batch, channels, height, width = x.shape
    out_channels, w = len(weight), width // SIDE
    y = x.new_empty(batch, height - 2, width, out_channels)
    kernel = _sum_kernel(_sum_kernel(weight.float().permute(2, 3, 0, 1)).movedim(1, 0))  # columns rows O C
    kernel = kernel.flatten(0, 1).to(weight.dtype).transpose(1, 2)
    row = width * max(channels, out_channels)
    rows = min(max(MAX_NUMBERS_AT_ONCE // (SIDE * row), 1) * SIDE, height - 2)
    # The sums along one direction lie where, before or after them, the products do.
    data, products, halves = (x.new_empty(count * rows * row) for count in (FACTORS, FACTORS, SIDE))
    for image, result in zip(x.movedim(1, -1), y, strict=True):
        for top in range(0, len(result), rows):
            block = result[top : top + rows]
            h = len(block) // SIDE
            by_row = _front(products, FACTORS, h, width + 2, channels)
            by_row[:, :, :: width + 1] = 0  # the padding
            _sum_data(image[top : top + len(block) + 2], 0, out=by_row[:, :, 1:-1])
            d = _front(data, FACTORS, FACTORS, h, w, channels)  # columns rows
            _sum_data(by_row, 2, out=d)
            m = _front(products, FACTORS, FACTORS, h, w, out_channels)
            torch.bmm(d.view(-1, h * w, channels), kernel, out=m.view(-1, h * w, out_channels))
            if bias is not None:
                m[1, 1] += bias  # of all products the one that every result has, and has with a plus
            by_column = _front(halves, SIDE, FACTORS, h, w, out_channels)
            _sum_products(m, out=by_column)
            _sum_products(by_column.movedim(1, 0), out=block.view(h, SIDE, w, SIDE, -1).permute(1, 3, 0, 2, 4))
    return y.movedim(-1, 1)
