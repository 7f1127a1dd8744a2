"""Tiny transformers and ControlNets with random weights, and inputs for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sana_sprint.transformer.control import SanaControlNetModel
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


def fill_with_noise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_transformer() -> Callable[..., SanaTransformer2DModel]:
    """A tiny Sprint transformer in eval mode; keywords change its config."""

    def make(**config: Any) -> SanaTransformer2DModel:
        model = SanaTransformer2DModel(**{**TINY, **config}).eval()
        fill_with_noise(model, seed=0)
        return model

    return make


@pytest.fixture
def make_control() -> Callable[..., SanaControlNetModel]:
    """A tiny ControlNet for such a transformer, in eval mode, that seems to have learnt something."""

    def make(**config: Any) -> SanaControlNetModel:
        model = SanaControlNetModel(**{**TINY, **config}).eval()
        fill_with_noise(model, seed=4)
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


@pytest.fixture
def drawing() -> torch.Tensor:
    """Latents of a drawing for each of the two pictures."""
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(5))
