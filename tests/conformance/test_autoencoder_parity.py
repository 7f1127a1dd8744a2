"""Our autoencoder beside diffusers', with equal random weights: same latents and pictures for every kind of block."""

from typing import Any

import diffusers
import pytest
import torch

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
NO_SCALES: dict[str, Any] = {
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "shuffling": {},
    "sana": {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"},
    "lite": {
        "downsample_block_type": "Conv",
        "decoder_block_types": "ResBlock",
        "decoder_layers_per_block": (0, 2, 1),
        "decoder_conv_act_fn": "silu",
    },
    "in": {
        "encoder_layers_per_block": (0, 2, 1),
        "decoder_layers_per_block": (0, 1, 2),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "relu", "silu"),
        **NO_SCALES,
    },
    "zero_first_by_convolution": {
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (0, 1, 1),
    },
    "no_shortcuts": {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "only_residual_blocks": {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"},
    "only_attention_blocks": {
        "encoder_block_types": "EfficientViTBlock",
        "decoder_block_types": "EfficientViTBlock",
        "decoder_norm_types": "batch_norm",
        "encoder_qkv_multiscales": ((5,), (), (3, 5)),
        "decoder_qkv_multiscales": ((), (3,), (5, 7)),
    },
    "other_activations": {"decoder_act_fns": "gelu", "decoder_conv_act_fn": "gelu"},
    "unequal_halves": {
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (16, 16, 64),
        "decoder_layers_per_block": (2, 1, 2),
    },
    "width_no_multiple_of_the_head": {"attention_head_dim": 12},
    "four_channels": {"in_channels": 4},
}
# Pixels: 2 x 2 and 2 x 4 latent cells, where upstream takes the quadratic form of attention, and 6 x 4, where not.
SIZES = [(8, 8), (8, 16), (24, 16)]


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(paired):
    return lambda **config: paired(AutoencoderDC, diffusers.AutoencoderDC, {**BASE, **config})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_float32_latents_and_pictures_are_upstreams(pair, difference, name, size):
    ours, theirs = pair(**CONFIGS[name])
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
        config = {**BASE, **CONFIGS[name], "attention_head_dim": 16}
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
    ours, theirs = pair(**CONFIGS["sana"])
    pictures = draw(2, 3, 16, 24)
    for model in (ours, theirs):
        model(pictures).sample.square().mean().backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # Ten times the forward pass: sums over all pixels, of terms that cancel.
        assert difference(parameter.grad, reference[name].grad) < 10 * FLOAT32, name


def test_training_moves_the_running_statistics_as_upstream_does(pair):
    ours, theirs = pair(**CONFIGS["in"])
    latents = draw(2, 4, 4, 4)
    for model in (ours, theirs):
        model.train().decode(latents)
    statistics = {k: v for k, v in theirs.state_dict().items() if "running_" in k or "num_batches" in k}
    assert statistics
    for name, value in statistics.items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


@torch.no_grad()
def test_tiled_pictures_are_upstreams_where_tiles_do_not_overlap(pair, difference):
    ours, theirs = pair(**CONFIGS["sana"])
    latents = draw(1, 4, 10, 7)
    for model in (ours, theirs):
        model.enable_tiling(16, 16, 12, 12)  # 4 latent cells, 3 apart: tiles begin at 0, 3 and 6, one cell overlaps
    found, expected = ours.decode(latents).sample, theirs.decode(latents).sample
    for rows in (slice(0, 12), slice(16, 24), slice(28, 36)):
        for columns in (slice(0, 12), slice(16, 24)):
            assert difference(found[:, :, rows, columns], expected[:, :, rows, columns]) < FLOAT32


@torch.no_grad()
def test_sliced_pictures_are_upstreams(pair, difference):
    ours, theirs = pair(**CONFIGS["sana"])
    latents = draw(3, 4, 4, 4)
    for model in (ours, theirs):
        model.enable_slicing()
    assert difference(ours.decode(latents).sample, theirs.decode(latents).sample) < FLOAT32
