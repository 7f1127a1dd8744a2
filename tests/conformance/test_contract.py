"""What callers of diffusers rely on without running a network: signatures, configs, class attributes, return types."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.transformer.model import SanaTransformer2DModel

PAIRS = {
    "transformer": (SanaTransformer2DModel, diffusers.SanaTransformer2DModel),
    "autoencoder": (AutoencoderDC, diffusers.AutoencoderDC),
}
METHODS = [
    ("transformer", "__init__"),
    ("transformer", "forward"),
    *(
        ("autoencoder", method)
        for method in ("__init__", "forward", "encode", "decode", "enable_tiling", "tiled_encode", "tiled_decode")
    ),
]
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 4,
        "out_channels": None,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
        "caption_channels": 6,
        "interpolation_scale": 2,
        "timestep_scale": 0.001,
    },
    "autoencoder": {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": [4, 8],
        "decoder_block_out_channels": (4, 8),
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": [[], [5]],
        "decoder_qkv_multiscales": ((), ()),
        "scaling_factor": 0.41407,
    },
}


def parameters_of(owner: type, method: str) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(getattr(owner, method))
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_parameters_have_upstreams_names_order_and_defaults(kind, method):
    ours, theirs = PAIRS[kind]
    assert parameters_of(ours, method) == parameters_of(theirs, method)


@pytest.mark.parametrize("kind", PAIRS)
def test_classes_have_upstreams_name_and_weights_file(kind):
    ours, theirs = PAIRS[kind]
    assert ours.__name__ == theirs.__name__
    assert (ours.config_name, ours.ignore_for_config) == (theirs.config_name, theirs.ignore_for_config)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_config_is_stored_as_upstream_stores_it(kind):
    ours, theirs = PAIRS[kind]
    assert dict(ours(**SMALL[kind]).config) == dict(theirs(**SMALL[kind]).config)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_model_is_made_from_upstreams_config(kind):
    ours, theirs = PAIRS[kind]
    reference = theirs(**SMALL[kind])
    made = ours.from_config(reference.config)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert theirs.from_config(made.config).config == reference.config


def test_the_transformer_offers_what_upstreams_does():
    ours, theirs = PAIRS["transformer"]
    for attribute in (
        "_supports_gradient_checkpointing",
        "_supports_group_offloading",
        "_no_split_modules",
        "_skip_layerwise_casting_patterns",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for mixin in (
        diffusers.ModelMixin,
        diffusers.ConfigMixin,
        AttentionMixin,
        PeftAdapterMixin,
        FromOriginalModelMixin,
    ):
        assert issubclass(ours, mixin), mixin


def test_the_autoencoder_offers_what_upstreams_does():
    ours, _ = PAIRS["autoencoder"]
    for mixin in (diffusers.ModelMixin, diffusers.ConfigMixin, AutoencoderMixin, FromOriginalModelMixin):
        assert issubclass(ours, mixin), mixin
    models = [model(**SMALL["autoencoder"]) for model in PAIRS["autoencoder"]]
    for attribute in (
        "spatial_compression_ratio",
        "temporal_compression_ratio",
        "use_slicing",
        "use_tiling",
        "tile_sample_min_height",
        "tile_sample_min_width",
        "tile_sample_stride_height",
        "tile_sample_stride_width",
        "tile_latent_min_height",
        "tile_latent_min_width",
    ):
        assert len({getattr(model, attribute) for model in models}) == 1, attribute


@pytest.mark.parametrize("kind", PAIRS)
def test_the_blocks_that_the_class_names_exist(kind):
    model = PAIRS[kind][0](**SMALL[kind])
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._repeated_blocks) <= names
    assert set(model._no_split_modules) <= names


def test_attention_processors_have_upstreams_names():
    ours, theirs = (model(**SMALL["transformer"]) for model in PAIRS["transformer"])
    assert list(ours.attn_processors) == list(theirs.attn_processors)


@torch.no_grad()
def test_outputs_have_upstreams_types():
    transformer = SanaTransformer2DModel(**SMALL["transformer"])
    inputs = (torch.randn(1, 4, 4, 4), torch.randn(1, 3, 6), torch.tensor([0.5]))
    output = transformer(*inputs)
    assert type(output) is Transformer2DModelOutput
    (sample,) = transformer(*inputs, return_dict=False)
    assert torch.equal(sample, output.sample)

    autoencoder = AutoencoderDC(**SMALL["autoencoder"])
    pictures = torch.randn(1, 3, 4, 4)
    encoded = autoencoder.encode(pictures)
    assert type(encoded) is EncoderOutput
    (latent,) = autoencoder.encode(pictures, return_dict=False)
    assert torch.equal(latent, encoded.latent)
    for method, argument, kind, field in (
        (autoencoder.decode, latent, DecoderOutput, "sample"),
        (autoencoder.forward, pictures, DecoderOutput, "sample"),
        (autoencoder.tiled_decode, latent, DecoderOutput, "sample"),
        (autoencoder.tiled_encode, pictures, EncoderOutput, "latent"),
    ):
        output = method(argument)
        assert type(output) is kind
        (value,) = method(argument, return_dict=False)
        assert torch.equal(value, output[field])
