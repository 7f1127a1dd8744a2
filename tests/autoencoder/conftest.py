"""Tiny autoencoders with random weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sana_sprint.autoencoder.model import AutoencoderDC

# Both kinds of block; four pixels per latent cell and axis.
TINY: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}


@pytest.fixture
def make_autoencoder() -> Callable[..., AutoencoderDC]:
    """A tiny autoencoder in eval mode; keywords change its config."""

    def make(**config: Any) -> AutoencoderDC:
        model = AutoencoderDC(**{**TINY, **config}).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    return lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
