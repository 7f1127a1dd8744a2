"""Tiny transformers with random weights, and inputs for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sana_sprint.transformer.model import SanaTransformer2DModel

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "sample_size": 6,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}


@pytest.fixture
def make_transformer() -> Callable[..., SanaTransformer2DModel]:
    """A tiny Sprint transformer in eval mode; keywords change its config."""

    def make(**config: Any) -> SanaTransformer2DModel:
        model = SanaTransformer2DModel(**{**TINY, **config}).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Two pictures of 4 x 6 cells; the first one's caption has 3 of 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 12, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([0.45, 0.2]),
        "encoder_attention_mask": torch.tensor([[1] * 3 + [0] * 4, [1] * 7]),
    }
