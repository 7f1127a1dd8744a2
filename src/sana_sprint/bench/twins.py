"""Configs and a seed to two pipelines, ours and diffusers', of networks that hold the same random weights once."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, AutoTokenizer, Gemma2Config

from sana_sprint.assets import embedded_checkpoint
from sana_sprint.memory.configs import PUBLISHED, PipelineConfigs, read_configs
from sana_sprint.plugin import CLASSES
from sana_sprint.quantisation.float8 import quantise_to_float8

Family = Literal["ours", "theirs"]

# The names that --model takes.
MODELS = {"1.6b" if "1.6B" in name else "0.6b": name for name in PUBLISHED}
QUICK = "quick"

# Odd, so that no two tensors begin at the same place of the noise; 64 MB.
_NOISE_NUMBERS = 2**24 - 3


def load_tokenizer() -> Any:
    """That of the embedded checkpoint, which is at hand offline. It reads SANA's instruction as 210 tokens."""
    return AutoTokenizer.from_pretrained(embedded_checkpoint() / "tokenizer")


def quick_configs() -> PipelineConfigs:
    """A pipeline of the published kind, so narrow and shallow that it draws 256 pixels in a fraction of a second."""
    published = read_configs(next(iter(PUBLISHED)))
    width = 256
    transformer = {
        "num_attention_heads": width // 32,
        "num_layers": 4,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": width // 4,
        "cross_attention_dim": width,
        "caption_channels": width,
        "sample_size": 8,
    }
    vae: dict[str, Any] = {}
    for coder in ("encoder", "decoder"):
        vae[f"{coder}_block_out_channels"] = (16, 32, 64, 64, 128, 128)
        vae[f"{coder}_layers_per_block"] = (1,) * 6
    text_encoder = Gemma2Config(
        vocab_size=len(load_tokenizer()),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
    )
    return PipelineConfigs({**published.transformer, **transformer}, {**published.vae, **vae}, text_encoder)


def configs_of(model: str) -> PipelineConfigs:
    """Those of one of `MODELS`, or of `QUICK`."""
    return quick_configs() if model == QUICK else read_configs(MODELS[model])


def class_of(family: Family, name: str) -> Any:
    """Our class of a name of diffusers, or its own, whether or not `register` has exchanged the two."""
    return getattr(import_module(getattr(CLASSES[name], family)), name)


def fill(module: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Give a module without weights random ones, of a variance that keeps signals at unit scale from layer to layer.

    Matrices and kernels have the variance 1 / inputs of an output; scales of norms are 1, all other vectors 0.02.
    Numbers are drawn once, on the CPU, and used again from the start for each tensor: seconds for billions of weights.
    """
    noise = torch.randn(_NOISE_NUMBERS, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    for name, empty in list(module.named_parameters()):
        values = torch.empty(empty.shape, dtype=dtype, device=device)
        if values.ndim < 2:
            values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.02)
        else:
            scale = values[0].numel() ** -0.5
            for part in values.view(-1).split(len(noise)):
                torch.mul(noise[: len(part)], scale, out=part)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))
    module.to(device)  # buffers, which are no weights


class Pair(NamedTuple):
    """Two pipelines, or two networks, with the same weights. What was not asked for is None in both pipelines."""

    ours: Any
    theirs: Any


@dataclass(kw_only=True)
class Twins:
    """Makes pairs of pipelines; networks that the last pair had are used again, the others are given up.

    Attributes:
        configs: of the networks.
        dtype, device: of the weights, which the two networks of a name share in memory.
        seed: of the weights.
        compiles: whether transformers and decoders are compiled, on both sides.
        float8: whether the products of our transformer are in float8; its weights are then its own.
    """

    configs: PipelineConfigs
    dtype: torch.dtype
    device: torch.device
    seed: int
    compiles: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        self._networks: dict[str, Pair] = {}

    def pair(self, names: Sequence[str]) -> Pair:
        """Pipelines with the networks of these names: "text_encoder", "transformer", "vae".

        They are new ones, which have read no text yet.
        """
        self._networks = {name: kept for name, kept in self._networks.items() if name in names}
        self._networks.update({name: self._network(name) for name in names if name not in self._networks})
        return Pair(self._pipeline("ours"), self._pipeline("theirs"))

    def _pipeline(self, family: Family) -> Any:
        parts: dict[str, Any] = {
            "text_encoder": None,
            "transformer": None,
            "vae": None,
            **{name: getattr(both, family) for name, both in self._networks.items()},
        }
        scheduler = class_of(family, "SCMScheduler")()
        # Of its own: diffusers' pipeline changes the side that its tokenizer pads on.
        pipe = class_of(family, "SanaSprintPipeline")(tokenizer=load_tokenizer(), scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _network(self, name: str) -> Pair:
        if name == "text_encoder":
            with init_empty_weights():
                encoder = AutoModel.from_config(self.configs.text_encoder).eval()
            fill(encoder, self.dtype, self.device, self.seed)
            return Pair(encoder, encoder)  # transformers' in both libraries
        kind = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}[name]
        config = getattr(self.configs, name)
        with init_empty_weights():
            ours, theirs = (class_of(family, kind).from_config(config).eval() for family in ("ours", "theirs"))
        fill(ours, self.dtype, self.device, self.seed)
        theirs.load_state_dict(ours.state_dict(), assign=True)
        theirs.requires_grad_(False).to(self.device)
        if self.float8 and name == "transformer":
            quantise_to_float8(ours)
        if self.compiles:
            for network in (ours, theirs):
                (network.decoder if name == "vae" else network).compile()
        return Pair(ours, theirs)
