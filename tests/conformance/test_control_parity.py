"""Our ControlNet beside diffusers', with equal random weights: same signature, folders, residuals and pictures."""

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput

from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

# Two implementations of the same sums in float32, in another order: some 1e-6 of the largest value.
FLOAT32 = 1e-5

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "sample_size": 6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patch_2": {"patch_size": 2, "sample_size": 12},
    "positions": {"interpolation_scale": 2.0},
    "attention_bias": {"attention_bias": True},
    "affine_norms": {"norm_elementwise_affine": True, "norm_eps": 1e-2},
    "fractional_expansion": {"mlp_ratio": 1.6},
}
OURS_ONLY = {"guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale", "residual_placement"}


def inputs_for(config: dict[str, Any], size: tuple[int, int] = (4, 9)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    patch = config.get("patch_size", 1)
    shape = (2, 4, size[0] * patch, size[1] * patch)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 12, generator=generator),
        "timestep": torch.rand(2, generator=generator),
        "controlnet_cond": torch.randn(shape, generator=generator),
        "encoder_attention_mask": torch.tensor([[1.0] * 3 + [0.0] * 4, [1.0] * 7]),
    }


@pytest.fixture
def pair(paired):
    return lambda **config: paired(SanaControlNetModel, diffusers.SanaControlNetModel, {**TINY, **config})


def parameters_of(owner: type, method: str) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(getattr(owner, method))
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize(("method", "ours_only"), [("__init__", OURS_ONLY), ("forward", {"guidance"})])
def test_parameters_begin_with_upstreams_and_the_others_have_defaults(method, ours_only):
    ours, theirs = parameters_of(SanaControlNetModel, method), parameters_of(diffusers.SanaControlNetModel, method)
    assert ours[: len(theirs)] == theirs
    assert {name for name, _, _ in ours[len(theirs) :]} == ours_only
    assert all(default is not inspect.Parameter.empty for _, _, default in ours[len(theirs) :])


def test_the_class_offers_what_upstreams_does():
    ours, theirs = SanaControlNetModel, diffusers.SanaControlNetModel
    assert (ours.__name__, ours.config_name) == (theirs.__name__, theirs.config_name)
    for name in ("_supports_gradient_checkpointing", "_no_split_modules", "_skip_layerwise_casting_patterns"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for mixin in (diffusers.ModelMixin, diffusers.ConfigMixin, AttentionMixin, PeftAdapterMixin):
        assert issubclass(ours, mixin), mixin
    models = ours(**TINY), theirs(**TINY)
    assert list(models[0].attn_processors) == list(models[1].attn_processors)


@pytest.mark.parametrize(("width", "cross_heads", "parameters"), [(1152, 16, 168_765_696), (2240, 20, 631_576_960)])
def test_a_published_controlnet_has_upstreams_keys_shapes_and_counts(width, cross_heads, parameters):
    config = {
        "num_attention_heads": width // 32,
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": width // cross_heads,
        "cross_attention_dim": width,
    }
    with torch.device("meta"):
        ours, theirs = SanaControlNetModel(**config), diffusers.SanaControlNetModel(**config)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert (sum(p.numel() for p in ours.parameters()), len(shapes[0])) == (parameters, 162)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_float32_residuals_are_upstreams(pair, difference, name):
    ours, theirs = pair(**CONFIGS[name])
    inputs = inputs_for(CONFIGS[name])
    found, wanted = ours(**inputs), theirs(**inputs)
    assert type(found) is SanaControlNetOutput
    assert len(found.controlnet_block_samples) == len(wanted.controlnet_block_samples) == 3
    for one, other in zip(found.controlnet_block_samples, wanted.controlnet_block_samples, strict=True):
        assert difference(one, other) < FLOAT32


@pytest.mark.parametrize("scale", [0.3, 0.0, torch.tensor(0.7), torch.tensor([[[0.2]], [[0.9]]])], ids=str)
@torch.no_grad()
def test_a_scale_means_what_it_means_upstream(pair, scale):
    ours, theirs = pair()
    inputs = {**inputs_for({}), "conditioning_scale": scale, "return_dict": False}
    for one, other in zip(ours(**inputs)[0], theirs(**inputs)[0], strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= FLOAT32 * other.abs().max()


@torch.no_grad()
def test_no_mask_means_what_it_means_upstream(pair, difference):
    ours, theirs = pair()
    inputs = {**inputs_for({}), "encoder_attention_mask": None}
    assert difference(ours(**inputs)[0][-1], theirs(**inputs)[0][-1]) < FLOAT32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_upstreams(pair, difference, checkpointing):
    ours, theirs = pair()
    inputs = inputs_for({})
    for model in (ours, theirs):
        if checkpointing:
            model.enable_gradient_checkpointing()
        sum(sample.square().mean() for sample in model(**inputs)[0]).backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # A bias of all keys alike leaves a softmax as it is: its gradient is zero, and what is seen is rounding.
        if not name.endswith("attn2.to_k.bias"):
            # Ten times the forward pass: sums over the batch's tokens, of terms that cancel.
            assert difference(parameter.grad, reference[name].grad) < 10 * FLOAT32, name


@torch.no_grad()
def test_transformer_and_controlnet_may_come_from_either_library(pair, paired, difference):
    transformers = paired(SanaTransformer2DModel, diffusers.SanaTransformer2DModel, {**TINY, "num_layers": 5}, 3)
    inputs = inputs_for({})
    velocities = []
    for transformer in transformers:
        for control in pair():
            drawn = {name: value for name, value in inputs.items() if name != "controlnet_cond"}
            (samples,) = control(**inputs, return_dict=False)
            velocities.append(transformer(**drawn, controlnet_block_samples=samples).sample)
    assert all(difference(velocity, velocities[-1]) < FLOAT32 for velocity in velocities)


@pytest.mark.parametrize("direction", ["ours_to_theirs", "theirs_to_ours"])
@torch.no_grad()
def test_a_saved_folder_loads_in_the_other_library(pair, difference, tmp_path, direction):
    ours, theirs = pair(interpolation_scale=1.0)
    saved, reader = (ours, type(theirs)) if direction == "ours_to_theirs" else (theirs, SanaControlNetModel)
    saved.save_pretrained(tmp_path)
    loaded, report = reader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is reader
    assert not any(report.values()), report
    assert difference(loaded(**inputs_for({}))[0][-1], saved(**inputs_for({}))[0][-1]) < FLOAT32


def test_a_config_has_upstreams_entries_and_ours(pair, tmp_path):
    configs = []
    for name, model in zip(("ours", "theirs"), pair(), strict=True):
        model.save_pretrained(tmp_path / name)
        configs.append(json.loads((tmp_path / name / "config.json").read_text()))
    ours, theirs = configs
    assert ours.items() >= theirs.items()
    assert ours.keys() - theirs.keys() == OURS_ONLY
    assert ours["residual_placement"] == "after"
