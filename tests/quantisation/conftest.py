"""A transformer wide enough for 4-bit weights, in bfloat16, its folders and inputs, and what it is quantised with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig

from sana_sprint import SanaTransformer2DModel

WIDE: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 128,
    "caption_channels": 64,
    "sample_size": 8,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4, double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}


@pytest.fixture(scope="session")
def settings() -> dict[str, dict[str, Any]]:
    """Every kind of quantisation by name, as keywords of diffusers' or transformers' config."""
    return CONFIGS


@pytest.fixture(params=CONFIGS)
def config(request) -> BitsAndBytesConfig:
    """Every kind of quantisation in turn."""
    return BitsAndBytesConfig(**CONFIGS[request.param])


@pytest.fixture(scope="session")
def wide_transformer() -> SanaTransformer2DModel:
    """Not quantised, and not to be altered."""
    torch.manual_seed(0)
    return SanaTransformer2DModel(**WIDE).eval().to(torch.bfloat16)


@pytest.fixture(scope="session")
def folder(wide_transformer, tmp_path_factory) -> Path:
    """The transformer in one file."""
    where = tmp_path_factory.mktemp("wide") / "transformer"
    wide_transformer.save_pretrained(where)
    return where


@pytest.fixture
def load(folder):
    """Loads a folder, that of the transformer if no other is given, in bfloat16 where there is no other dtype."""

    def from_folder(where: Path = folder, **options: Any) -> SanaTransformer2DModel:
        return SanaTransformer2DModel.from_pretrained(where, **{"torch_dtype": torch.bfloat16, **options})

    return from_folder


@pytest.fixture(scope="session")
def velocity():
    """What a transformer gives for two pictures of 4 x 6 cells, on its device, in float32."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 32, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 64, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([0.45, 0.2]),
    }

    @torch.no_grad()
    def run(model: torch.nn.Module) -> torch.Tensor:
        cast = {name: value.to(model.device, model.dtype if value.ndim > 1 else None) for name, value in inputs.items()}
        return model(**cast).sample.float()

    return run


@pytest.fixture(scope="session")
def error_of():
    """The relative error of one tensor against another."""

    def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
        return ((found.float() - exact.float()).norm() / exact.float().norm()).item()

    return relative


@pytest.fixture(scope="session")
def equal_states():
    """Whether two models have the same weights under the same keys, bit for bit, with all scales and codes."""

    def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
        first, second = one.state_dict(), other.state_dict()
        return first.keys() == second.keys() and all(
            first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
        )

    return equal
