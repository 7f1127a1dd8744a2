"""Embeddings: values of positions and times, the order of tokens, and when guidance must or must not be given."""

import math

import pytest
import torch

from sana_sprint.layers.embeddings import (
    PatchEmbed,
    TimeEmbedding,
    TimeGuidanceEmbedding,
    sincos_positions,
    sinusoidal_features,
)


def test_sinusoidal_features_are_sines_and_cosines_at_geometric_frequencies():
    positions = torch.tensor([0.0, 0.3, 7.0], dtype=torch.float64)
    found = sinusoidal_features(positions, 6, cosine_first=True)
    for row, position in zip(found, positions.tolist(), strict=True):
        angles = [position * 10000 ** (-k / 3) for k in range(3)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64))
    swapped = sinusoidal_features(positions, 6, cosine_first=False)
    assert torch.equal(swapped, found.roll(3, dims=1))


def test_positions_hold_columns_first_and_rows_second():
    grid = sincos_positions(3, 5, 16, base_size=4, interpolation_scale=1.0).view(3, 5, 16)
    columns, rows = grid[..., :8], grid[..., 8:]
    assert torch.equal(columns, columns[:1].expand(3, -1, -1))
    assert torch.equal(rows, rows[:, :1].expand(-1, 5, -1))
    assert len({tuple(cell.tolist()) for cell in grid.view(-1, 16)}) == 15


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_positions_of_any_grid_span_the_grid_of_the_checkpoint(scale):
    trained = sincos_positions(4, 4, 16, base_size=4, interpolation_scale=scale).view(4, 4, 16)
    finer = sincos_positions(8, 12, 16, base_size=4, interpolation_scale=scale).view(8, 12, 16)
    # The same float32 coordinates, reached by another division.
    torch.testing.assert_close(finer[::2, ::3], trained, atol=1e-6, rtol=0)
    assert torch.equal(finer[0, 0], torch.tensor([0.0] * 4 + [1.0] * 4).repeat(2))


@pytest.mark.parametrize("size", [(6, 4), (4, 4)], ids=["other", "as_trained"])
@torch.no_grad()
def test_tokens_are_patches_row_by_row_plus_their_positions(size):
    embed = PatchEmbed(sample_size=4, patch_size=2, in_channels=3, dim=8, interpolation_scale=1.0)
    latents = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    tokens = embed(latents)
    positions = sincos_positions(size[0] // 2, size[1] // 2, 8, base_size=2, interpolation_scale=1.0)
    patch = latents[0, :, 2:4, 0:2]
    assert embed.proj.bias is not None
    expected = (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias + positions[0, size[1] // 2]
    # float32, a sum of twelve terms.
    torch.testing.assert_close(tokens[0, size[1] // 2], expected, atol=1e-5, rtol=1e-5)


def test_positions_are_not_stored_in_checkpoints():
    embed = PatchEmbed(sample_size=4, patch_size=1, in_channels=3, dim=8, interpolation_scale=1.0)
    assert set(embed.state_dict()) == {"proj.weight", "proj.bias"}


@torch.no_grad()
def test_close_times_stay_apart_in_bfloat16():
    embedding = TimeEmbedding(16).bfloat16()
    times = torch.tensor([0.5, 0.5 + 1e-3])  # one and the same number in bfloat16
    modulation, _ = embedding(times * 1000, None, torch.bfloat16)
    assert modulation.dtype == torch.bfloat16
    assert not torch.equal(modulation[0], modulation[1])


def test_guidance_that_the_model_cannot_use_is_refused():
    with pytest.raises(ValueError, match=r"no guidance embedding \(guidance_embeds=False\): guidance must be None"):
        TimeEmbedding(8)(torch.tensor([0.5]), torch.tensor([0.45]), torch.float32)


def test_missing_guidance_is_asked_for():
    with pytest.raises(
        ValueError, match=r"embeds its guidance \(guidance_embeds=True\): pass guidance, one number per"
    ):
        TimeGuidanceEmbedding(8)(torch.tensor([0.5]), None, torch.float32)


@torch.no_grad()
def test_a_guidance_embedding_of_zero_weights_changes_nothing():
    # How a student starts from its teacher: the embeddings are added.
    plain, guided = TimeEmbedding(8), TimeGuidanceEmbedding(8)
    guided.timestep_embedder.load_state_dict(plain.emb["timestep_embedder"].state_dict())
    guided.linear.load_state_dict(plain.linear.state_dict())
    for parameter in guided.guidance_embedder.linear_2.parameters():
        parameter.zero_()
    time = torch.tensor([0.1, 0.9])
    for found, expected in zip(
        guided(time, torch.tensor([0.3, 0.6]), torch.float32), plain(time, None, torch.float32), strict=True
    ):
        assert torch.equal(found, expected)
