"""Our autoencoder beside diffusers', with equal random weights: same latents and pictures for every kind of block."""

from typing import Any

import diffusers
import pytest
import torch
from autoencoder_variants import VARIANTS

from sana_sprint.autoencoder.model import AutoencoderDC

# Two implementations of the same sums in float32, through a dozen convolutions that sum hundreds of terms each.
FLOAT32 = 1e-4
# Half precision: single draws of weights scatter by a tenth to either side of 1.
ROUNDING = 1.2

BASE: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}
# Pixels: 2 x 2 and 2 x 4 latent cells, where upstream takes the quadratic form of attention, and 6 x 4, where not.
SIZES = [(8, 8), (8, 16), (24, 16)]


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(paired):
    return lambda **config: paired(AutoencoderDC, diffusers.AutoencoderDC, {**BASE, **config})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_float32_latents_and_pictures_are_upstreams(pair, difference, name, size):
    ours, theirs = pair(**VARIANTS[name])
    pictures = draw(2, ours.config.in_channels, *size)
    latents = draw(2, 4, size[0] // 4, size[1] // 4, seed=2)
    assert difference(ours.encode(pictures).latent, theirs.encode(pictures).latent) < FLOAT32
    assert difference(ours.decode(latents).sample, theirs.decode(latents).sample) < FLOAT32
    assert difference(ours(pictures).sample, theirs(pictures).sample) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("size", [(8, 8), (32, 24)], ids=str)
@pytest.mark.parametrize("name", ["sana", "lite", "in"])
@torch.no_grad()
def test_half_precision_is_as_close_to_float32_as_upstreams(paired, error, name, size, dtype):
    errors = torch.zeros(2, 2)  # encoder and decoder, ours and theirs
    for seed in range(3):
        # Wider heads than BASE's: of 8 features often none is positive, and then rounding decides on any value.
        config = {**BASE, **VARIANTS[name], "attention_head_dim": 16}
        models = paired(AutoencoderDC, diffusers.AutoencoderDC, config, seed)
        pictures, latents = draw(2, 3, *size, seed=seed), draw(2, 4, size[0] // 4, size[1] // 4, seed=seed + 10)
        exact = models[1].encode(pictures).latent, models[1].decode(latents).sample
        for column, model in enumerate(models):
            model.to(dtype)
            found = model.encode(pictures.to(dtype)).latent, model.decode(latents.to(dtype)).sample
            assert {output.dtype for output in found} == {dtype}
            errors[:, column] += torch.tensor([error(*pair) for pair in zip(found, exact, strict=True)])
    assert (errors[:, 0] < ROUNDING * errors[:, 1]).all()


def test_gradients_are_upstreams(pair, difference):
    ours, theirs = pair(**VARIANTS["sana"])
    pictures = draw(2, 3, 16, 24)
    for model in (ours, theirs):
        model(pictures).sample.square().mean().backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # Ten times the forward pass: sums over all pixels, of terms that cancel.
        assert difference(parameter.grad, reference[name].grad) < 10 * FLOAT32, name


def test_training_moves_the_running_statistics_as_upstream_does(pair):
    ours, theirs = pair(**VARIANTS["in"])
    latents = draw(2, 4, 4, 4)
    for model in (ours, theirs):
        model.train().decode(latents)
    statistics = {k: v for k, v in theirs.state_dict().items() if "running_" in k or "num_batches" in k}
    assert statistics
    for name, value in statistics.items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


@torch.no_grad()
def test_tiled_pictures_are_upstreams_where_tiles_do_not_overlap(pair, difference):
    ours, theirs = pair(**VARIANTS["sana"])
    latents = draw(1, 4, 10, 7)
    for model in (ours, theirs):
        model.enable_tiling(16, 16, 12, 12)  # 4 latent cells, 3 apart: tiles begin at 0, 3 and 6, one cell overlaps
    found, expected = ours.decode(latents).sample, theirs.decode(latents).sample
    for rows in (slice(0, 12), slice(16, 24), slice(28, 36)):
        for columns in (slice(0, 12), slice(16, 24)):
            assert difference(found[:, :, rows, columns], expected[:, :, rows, columns]) < FLOAT32


@torch.no_grad()
def test_sliced_pictures_are_upstreams(pair, difference):
    ours, theirs = pair(**VARIANTS["sana"])
    latents = draw(3, 4, 4, 4)
    for model in (ours, theirs):
        model.enable_slicing()
    assert difference(ours.decode(latents).sample, theirs.decode(latents).sample) < FLOAT32
