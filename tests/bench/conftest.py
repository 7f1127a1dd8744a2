"""A pipeline of tiny networks to be measured, in half the seconds of --quick, and settings around it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from sana_sprint.bench.cases import CASES
from sana_sprint.bench.session import Settings
from sana_sprint.bench.twins import Twins, load_tokenizer
from sana_sprint.memory.configs import PUBLISHED, PipelineConfigs, read_configs

WIDTH = 64


@pytest.fixture(scope="session")
def configs() -> PipelineConfigs:
    """Two layers of each kind, widths of 64 and below, and six stages of the autoencoder as in the published one."""
    published = read_configs(next(iter(PUBLISHED)))
    transformer = {
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        "sample_size": 4,
    }
    vae: dict[str, Any] = {}
    for coder in ("encoder", "decoder"):
        vae[f"{coder}_block_out_channels"] = (8, 8, 16, 32, 32, 32)
        vae[f"{coder}_layers_per_block"] = (1,) * 6
    text_encoder = Gemma2Config(
        vocab_size=len(load_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    return PipelineConfigs({**published.transformer, **transformer}, {**published.vae, **vae}, text_encoder)


@pytest.fixture
def make_twins(configs) -> Callable[..., Twins]:
    """Makes twins in float32 on the CPU, or as asked."""

    def make(**asked: Any) -> Twins:
        return Twins(**{"configs": configs, "dtype": torch.float32, "device": torch.device("cpu"), "seed": 0, **asked})

    return make


@pytest.fixture
def make_settings(configs) -> Callable[..., Settings]:
    """Makes settings of every case, once, at 64 pixels, or as asked."""

    def make(**asked: Any) -> Settings:
        plain = {
            "models": {"tiny": configs},
            "cases": CASES,
            "sizes": ((64, 64),),
            "batches": (1,),
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "rounds": 1,
        }
        return Settings(**{**plain, **asked})

    return make


@pytest.fixture
def case() -> Callable[[str], Any]:
    """A case by its name."""
    return lambda name: next(case for case in CASES if case.name == name)
