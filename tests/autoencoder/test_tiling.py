"""Tiles: they cover every picture, their weights sum to one, and what is tiled is what is whole."""

import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.autoencoder.tiling import apply_tiled, blending_weights, tile_starts

# Size, tile, stride: sizes below, at and just beyond a tile, and strides that do not end where the picture does.
AXES = [
    (3, 4, 3),
    (4, 4, 3),
    (5, 4, 3),
    (16, 4, 4),
    (17, 4, 4),
    (17, 5, 1),
    (40, 16, 14),
    (41, 16, 14),
    (33, 16, 9),
]


@pytest.mark.parametrize(("size", "tile", "stride"), AXES)
def test_tiles_cover_an_axis_and_stay_inside(size, tile, stride):
    starts = tile_starts(size, tile, stride)
    assert starts[0] == 0
    assert starts[-1] == max(size - tile, 0)
    assert all(0 < after - before <= stride for before, after in pairwise(starts))


@pytest.mark.parametrize(("size", "tile", "stride"), AXES)
def test_the_weights_at_every_position_sum_to_one(size, tile, stride):
    starts = tile_starts(size, tile, stride)
    total = torch.zeros(size)
    for start, weights in zip(starts, blending_weights(starts, tile, size), strict=True):
        assert (weights > 0).all()
        total[start : start + len(weights)] += weights
    # A few float32 numbers, divided by their sum.
    torch.testing.assert_close(total, torch.ones(size), atol=1e-6, rtol=0)


def test_two_tiles_are_blended_by_a_symmetric_ramp():
    first, second = blending_weights([0, 6], 10, 16)
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])
    torch.testing.assert_close(second, torch.cat([ramp, torch.ones(6)]))
    torch.testing.assert_close(first, second.flip(0))


def random_cases(count: int) -> list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """Sizes, tiles and strides (each height and width, in latent cells), reproducibly drawn."""
    dice = random.Random(0)
    cases = []
    for _ in range(count):
        tile = dice.randint(1, 9), dice.randint(1, 9)
        stride = dice.randint(1, tile[0]), dice.randint(1, tile[1])
        cases.append(((dice.randint(1, 24), dice.randint(1, 24)), tile, stride))
    return cases


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_local_network_gives_the_same_tiled_as_whole_whatever_the_sizes(draw, ratio):
    for size, tile, stride in random_cases(60):
        latents = draw(2, 3, *size)
        seen: list[torch.Size] = []

        def enlarge(x: torch.Tensor, seen: list[torch.Size] = seen) -> torch.Tensor:
            seen.append(x.shape[-2:])
            return x.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)

        found = apply_tiled(enlarge, latents, tile, stride, Fraction(ratio))
        # Weights that sum to one within rounding.
        torch.testing.assert_close(found, enlarge(latents), atol=1e-5, rtol=1e-5)
        assert all(height <= tile[0] and width <= tile[1] for height, width in seen[:-1])

        pixels = draw(2, 3, size[0] * ratio, size[1] * ratio, seed=1)
        large_tile, large_stride = ((ratio * axis[0], ratio * axis[1]) for axis in (tile, stride))
        found = apply_tiled(lambda x: F.avg_pool2d(x, ratio), pixels, large_tile, large_stride, Fraction(1, ratio))
        torch.testing.assert_close(found, F.avg_pool2d(pixels, ratio), atol=1e-5, rtol=1e-5)


def test_the_result_has_the_dtype_and_channels_of_the_network(draw):
    found = apply_tiled(lambda x: x[:, :2].bfloat16(), draw(1, 4, 9, 7), (4, 4), (3, 3), Fraction(1))
    assert found.dtype == torch.bfloat16
    # Weights and products of 8 bits.
    torch.testing.assert_close(found.float(), draw(1, 4, 9, 7)[:, :2], atol=0.02, rtol=0.02)


def test_gradients_reach_every_part_of_the_input(draw):
    x = draw(1, 1, 9, 11).requires_grad_()
    apply_tiled(lambda part: 3 * part, x, (4, 4), (3, 3), Fraction(1)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))
