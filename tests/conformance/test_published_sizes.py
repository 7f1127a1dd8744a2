"""The published checkpoints' configs, on the meta device: upstream's keys and shapes, and the counts once measured."""

from typing import Any

import diffusers
import pytest
import torch

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.transformer.model import SanaTransformer2DModel

QK_NORM = {"qk_norm": "rms_norm_across_heads"}
SPRINT = {**QK_NORM, "guidance_embeds": True}


def transformer(width: int, depth: int, cross_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": width // 32,
        "attention_head_dim": 32,
        "num_layers": depth,
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": width // cross_heads,
        "cross_attention_dim": width,
        **others,
    }


# Config, parameters, tensors: as published for each checkpoint.
TRANSFORMERS = {
    "sana-0.6b": (transformer(1152, 28, 16), 591_747_872, 548),
    "sana-0.6b-teacher": (transformer(1152, 28, 16, **QK_NORM), 591_876_896, 660),
    "sprint-0.6b": (transformer(1152, 28, 16, **SPRINT), 593_501_216, 664),
    "sana-1.6b": (transformer(2240, 20, 20), 1_604_462_752, 396),
    "sana-1.6b-4k": (transformer(2240, 20, 20, sample_size=128, interpolation_scale=2.0), 1_604_462_752, 396),
    "sana1.5-1.6b": (transformer(2240, 20, 20, **QK_NORM), 1_604_641_952, 476),
    "sprint-1.6b": (transformer(2240, 20, 20, **SPRINT), 1_610_237_472, 480),
    "sana1.5-4.8b": (transformer(2240, 60, 20, **QK_NORM), 4_721_825_952, 1396),
}

WIDTHS = (128, 256, 512, 512, 1024, 1024)


def imagenet_autoencoder(latent_channels: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """The "in" and "mix" family: three stages of ResBlocks, then EfficientViT blocks, two each."""
    deep = len(widths) - 3
    return {
        "latent_channels": latent_channels,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * deep,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * deep,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": (0, 4, 8) + (2,) * deep,
        "decoder_layers_per_block": (0, 5, 10) + (2,) * deep,
        "encoder_qkv_multiscales": ((),) * len(widths),
        "decoder_qkv_multiscales": ((),) * len(widths),
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * deep,
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * deep,
    }


SANA_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA_ENCODER = {"encoder_block_types": SANA_BLOCKS, "downsample_block_type": "Conv", "scaling_factor": 0.41407}

# Config, parameters, tensors; None where nobody has published a count.
AUTOENCODERS: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
    "sana-1.1": (
        {**SANA_ENCODER, "decoder_block_types": SANA_BLOCKS, "upsample_block_type": "interpolate"},
        312_250_275,
        375,
    ),
    "lite-1.1": (
        {
            **SANA_ENCODER,
            "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
            "decoder_qkv_multiscales": ((),) * 6,
            "decoder_conv_act_fn": "silu",
        },
        None,
        None,
    ),
    "f32-in-1.0": (imagenet_autoencoder(32, WIDTHS), 323_356_460, 362),
    "f64-in-1.0": (imagenet_autoencoder(128, (*WIDTHS, 2048)), 676_896_140, 418),
    "f128-in-1.0": (imagenet_autoencoder(512, (*WIDTHS, 2048, 2048)), 1_120_682_252, 474),
}

CASES = [
    *((SanaTransformer2DModel, diffusers.SanaTransformer2DModel, name, *TRANSFORMERS[name]) for name in TRANSFORMERS),
    *((AutoencoderDC, diffusers.AutoencoderDC, name, *AUTOENCODERS[name]) for name in AUTOENCODERS),
]


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("ours", "theirs", "name", "config", "parameters", "tensors"), CASES, ids=[c[2] for c in CASES]
)
def test_a_published_model_has_upstreams_keys_shapes_and_counts(ours, theirs, name, config, parameters, tensors):
    with torch.device("meta"):
        model, reference = ours(**config), theirs(**config)
    assert shapes_of(model) == shapes_of(reference)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert len(model.state_dict()) == tensors


def test_the_defaults_are_the_1_6b_transformer_without_norms():
    with torch.device("meta"):
        model = SanaTransformer2DModel()
    assert sum(p.numel() for p in model.parameters()) == TRANSFORMERS["sana-1.6b"][1]


@pytest.mark.parametrize(("name", "ratio"), [("f32-in-1.0", 32), ("f64-in-1.0", 64), ("f128-in-1.0", 128)])
def test_pictures_and_latents_of_a_published_autoencoder_fit_together(name, ratio):
    with torch.device("meta"):
        model = AutoencoderDC(**AUTOENCODERS[name][0])
        latents = model.encode(torch.empty(1, 3, 2 * ratio, 3 * ratio)).latent
        assert latents.shape == (1, model.config.latent_channels, 2, 3)
        assert model.decode(latents).sample.shape == (1, 3, 2 * ratio, 3 * ratio)
