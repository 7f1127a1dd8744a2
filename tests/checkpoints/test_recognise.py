"""What a checkpoint is, from names and shapes alone; and one line for what it is not."""

from typing import Any

import diffusers
import pytest
import torch

from sana_sprint.checkpoints.plan import TensorInfo
from sana_sprint.checkpoints.recognise import PREFIXES, recognise


def infos(shapes: dict[str, Any]) -> dict[str, TensorInfo]:
    """Of tensors or of shapes."""
    described = {}
    for name, value in shapes.items():
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        described[name] = TensorInfo(tuple(getattr(value, "shape", value)), dtype)
    return described


QK_NORM = "rms_norm_across_heads"
BIG = {"num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
SMALL = {"num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72}
FLOW = {"timestep_scale": 1.0, "guidance_embeds": False}
# Name for people, scheduler, flow shift, and what of the config is telling.
TRANSFORMERS: dict[str, tuple[str, str, float | None, dict[str, Any]]] = {
    "sana-0.6b": ("SANA 0.6B, 1024 px", "flow", 3.0, {**SMALL, **FLOW, "num_layers": 28, "qk_norm": None}),
    "sana-0.6b-teacher": (
        "SANA-Sprint teacher 0.6B, 1024 px", "flow", 3.0, {**SMALL, "timestep_scale": 0.001, "qk_norm": QK_NORM}
    ),
    "sprint-0.6b": (
        "SANA-Sprint 0.6B, 1024 px", "scm", None,
        {**SMALL, "timestep_scale": 1.0, "guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": QK_NORM},
    ),
    "sana-1.6b": ("SANA 1.6B, 1024 px", "flow", 3.0, {**BIG, **FLOW, "sample_size": 32, "interpolation_scale": None}),
    "sana-1.6b-512": ("SANA 1.6B, 512 px", "flow", 3.0, {**BIG, "sample_size": 16, "interpolation_scale": None}),
    "sana-1.6b-2k": ("SANA 1.6B, 2048 px", "flow", 3.0, {**BIG, "sample_size": 64, "interpolation_scale": 1.0}),
    "sana-1.6b-4k": ("SANA 1.6B, 4096 px", "flow", 6.0, {**BIG, "sample_size": 128, "interpolation_scale": 2.0}),
    "sana1.5-1.6b": ("SANA 1.5 1.6B, 1024 px", "flow", 3.0, {**BIG, **FLOW, "num_layers": 20, "qk_norm": QK_NORM}),
    "sprint-1.6b": (
        "SANA-Sprint 1.6B, 1024 px", "scm", None,
        {**BIG, "num_layers": 20, "guidance_embeds": True, "timestep_scale": 1.0, "sample_size": 32},
    ),
    "sana1.5-4.8b": ("SANA 1.5 4.8B, 1024 px", "flow", 3.0, {**BIG, **FLOW, "num_layers": 60, "qk_norm": QK_NORM}),
}  # fmt: skip
WIDTHS = (128, 256, 512, 512, 1024, 1024)
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dc-ae-sana": (
        "DC-AE f32c32 (sana-1.0 or 1.1)",
        {
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
            "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
            "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
            "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
            "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
            "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "decoder_conv_act_fn": "relu",
        },
    ),
    "dc-ae-lite": (
        "DC-AE Lite f32c32",
        {
            "downsample_block_type": "Conv",
            "upsample_block_type": "pixel_shuffle",
            "scaling_factor": 0.41407,
            "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
            "decoder_qkv_multiscales": ((),) * 6,
            "decoder_block_types": "ResBlock",
            "decoder_conv_act_fn": "silu",
        },
    ),
    "dc-ae-f32": (
        "DC-AE f32c32 (mix-1.0)",
        {
            "downsample_block_type": "pixel_unshuffle",
            "upsample_block_type": "pixel_shuffle",
            "scaling_factor": 0.4552,
            "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
            "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
            "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
            "decoder_conv_act_fn": "relu",
        },
    ),
    "dc-ae-f64": ("DC-AE f64c128 (mix-1.0)", {"latent_channels": 128, "scaling_factor": 0.4538}),
    "dc-ae-f128": ("DC-AE f128c512 (mix-1.0)", {"latent_channels": 512, "scaling_factor": 0.3620}),
}


@pytest.mark.parametrize("key", sorted(TRANSFORMERS))
def test_a_published_transformer_is_known_by_its_shapes(published, key):
    name, scheduler, shift, telling = TRANSFORMERS[key]
    family = recognise(infos(published(key)))
    assert (family.kind, family.layout, family.name) == ("transformer", "original", name)
    assert (family.scheduler, family.flow_shift) == (scheduler, shift)
    assert family.config.items() >= {**telling, "in_channels": 32, "caption_channels": 2304, "mlp_ratio": 2.5}.items()


@pytest.mark.parametrize("key", sorted(AUTOENCODERS))
def test_a_published_autoencoder_is_known_by_its_shapes(published, key):
    name, telling = AUTOENCODERS[key]
    family = recognise(infos(published(key)))
    assert (family.kind, family.layout, family.name, family.scheduler) == ("autoencoder", "original", name, None)
    assert {setting: family.config[setting] for setting in telling} == telling
    assert family.config["encoder_block_out_channels"][:6] == family.config["decoder_block_out_channels"][:6] == WIDTHS


@pytest.mark.parametrize("size", ["0.6b", "1.6b"])
def test_a_published_controlnet_is_known_and_its_config_says_where_residuals_go(published, size):
    tensors = infos(published(f"controlnet-{size}"))
    family = recognise(tensors)
    assert (family.kind, family.name) == ("controlnet", f"SANA ControlNet {size.upper()}, 1024 px")
    assert family.config["num_layers"] == 7
    assert family.config["residual_placement"] == "before"
    base = recognise(tensors, kind="transformer")
    assert (base.kind, base.name) == ("transformer", f"SANA {size.upper()}, 1024 px")


def test_a_controlnet_of_diffusers_adds_its_residuals_after_blocks():
    with torch.device("meta"):
        model = diffusers.SanaControlNetModel()
    family = recognise(infos(model.state_dict()))
    assert (family.kind, family.layout, family.config["residual_placement"]) == ("controlnet", "diffusers", "after")
    given = recognise(infos(model.state_dict()), settings={"residual_placement": "before"})
    assert given.config["residual_placement"] == "before"


def doubts(shapes: dict[str, Any], file_name: str = "", **settings: Any) -> dict[str, Any]:
    """What is in doubt, and what was chosen."""
    family = recognise(infos(shapes), file_name=file_name, settings=settings)
    return {doubt.setting: doubt.chosen for doubt in family.ambiguous}


def test_what_shapes_cannot_tell_is_said_with_the_choice(published):
    assert doubts(published("sprint-1.6b")) == {}
    assert doubts(published("sana1.5-1.6b")) == {"timestep_scale": 1.0}
    assert doubts(published("sana-0.6b-teacher")) == {"timestep_scale": 0.001}
    assert doubts(published("sana1.5-4.8b")) == {}
    assert doubts(published("dc-ae-f64")) == {"scaling_factor": 0.4538}
    assert doubts(published("dc-ae-sana")) == {}
    without_positions = published("sprint-1.6b")
    del without_positions["pos_embed"]
    assert doubts(without_positions) == {"sample_size": 32}
    doubt = recognise(infos(without_positions)).ambiguous[0]
    assert str(doubt) == (
        "trained for 1024 pixels, or 512, 2K, 4K: took sample_size 32, not 16 or 64 or 128;"
        " give sample_size to override"
    )


@pytest.mark.parametrize(
    ("key", "file_name", "setting", "value"),
    [
        ("sana1.5-1.6b", "Sana_Sprint_1.6B_1024px_teacher.pth", "timestep_scale", 0.001),
        ("sana1.5-1.6b", "teacher/checkpoints/model.pth", "timestep_scale", 0.001),
        ("sana1.5-1.6b", "/home/teacher/a/b/model.pth", "timestep_scale", 1.0),
        ("sana1.5-1.6b", "SANA1.5_1.6B_1024px.pth", "timestep_scale", 1.0),
        ("sana1.5-1.6b", "teachers/SANA1.5_1.6B_1024px.pth", "timestep_scale", 1.0),
        ("sana1.5-1.6b", "sana1.5/Sana_Sprint_1.6B_1024px_teacher.pth", "timestep_scale", 0.001),
        ("dc-ae-f32", "dc-ae-f32c32-in-1.0/model.safetensors", "scaling_factor", 0.3189),
        ("dc-ae-f32", "dc-ae-f32c32-mix-1.0/model.safetensors", "scaling_factor", 0.4552),
        ("dc-ae-f64", "dc-ae-f64c128-in-1.0.pt", "scaling_factor", 0.2889),
        ("dc-ae-f128", "dc-ae-f128c512-in-1.0.pt", "scaling_factor", 0.4883),
    ],
)
def test_a_files_name_settles_what_shapes_cannot_tell(published, key, file_name, setting, value):
    assert recognise(infos(published(key)), file_name=file_name).config[setting] == value
    other = recognise(infos(published(key)), file_name=file_name, settings={setting: 0.5})
    assert other.config[setting] == 0.5
    assert other.ambiguous == ()


@pytest.mark.parametrize(
    ("file_name", "sample_size", "scale"),
    [
        ("Sana_1600M_512px_MultiLing.pth", 16, None),
        ("Sana_1600M_1024px.pth", 32, None),
        ("Sana_1600M_2Kpx_BF16.pth", 64, 1.0),
        ("Sana_1600M_4Kpx_BF16/checkpoints/model.pth", 128, 2.0),
    ],
)
def test_without_positions_the_size_of_pictures_is_read_from_the_files_name(published, file_name, sample_size, scale):
    shapes = published("sana-1.6b")
    # Positions in the file outweigh its name.
    assert recognise(infos(shapes), file_name=file_name).config["sample_size"] == 32
    del shapes["pos_embed"]
    config = recognise(infos(shapes), file_name=file_name).config
    assert (config["sample_size"], config["interpolation_scale"]) == (sample_size, scale)
    asked = recognise(infos(shapes), settings={"sample_size": sample_size}).config
    assert (asked["sample_size"], asked["interpolation_scale"]) == (sample_size, scale)


@pytest.mark.parametrize("file", ["", "/model.safetensors", "/checkpoints/model.pth"])
def test_the_name_of_a_repository_is_read_in_the_hubs_cache_too(published, file):
    path = f"/cache/models--mit-han-lab--dc-ae-f32c32-in-1.0/snapshots/{'0a' * 20}{file}"
    family = recognise(infos(published("dc-ae-f32")), file_name=path)
    assert (family.config["scaling_factor"], family.ambiguous) == (0.3189, ())


def test_of_an_autoencoder_of_an_unpublished_ratio_nothing_is_guessed_unsaid(reduced):
    shallow = {name: t for name, t in reduced("dc-ae-sana").tensors.items() if ".5.op_list." not in name}
    assert doubts(shallow) == {"scaling_factor": 1.0, "decoder_conv_act_fn": "relu"}
    assert doubts(shallow, scaling_factor=0.9, decoder_conv_act_fn="silu") == {}


def test_of_an_unpublished_width_the_heads_of_cross_attention_are_in_doubt_unless_given(reduced):
    tensors = reduced("sana").tensors
    assert doubts(tensors) == {"cross_attention_head_dim": 32}
    for settings in ({"cross_attention_head_dim": 16}, {"num_cross_attention_heads": 4}):
        config = recognise(infos(tensors), settings=settings).config
        assert (config["num_cross_attention_heads"], config["cross_attention_head_dim"]) == (4, 16)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_before_every_name_is_found(reduced, prefix):
    tensors = reduced("sprint").tensors
    bare = recognise(infos(tensors))
    family = recognise(infos({prefix + name: tensor for name, tensor in tensors.items()}))
    assert family.prefix == prefix
    assert family.config == bare.config


def test_the_entries_of_a_config_file_win_and_its_private_ones_are_passed_over(reduced):
    settings = {"_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.42.1", "norm_eps": 1e-5}
    assert recognise(infos(reduced("sana").tensors), settings=settings).config["norm_eps"] == 1e-5


def refusal(tensors: dict[str, TensorInfo], **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        recognise(tensors, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_empty_file_is_refused():
    assert refusal({}) == "the checkpoint is empty: it holds no tensors"


@pytest.mark.parametrize(
    "model",
    [
        lambda: diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        lambda: diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32), norm_num_groups=8),
        lambda: diffusers.PixArtTransformer2DModel(num_layers=2, num_attention_heads=2, cross_attention_dim=144),
        lambda: torch.nn.Linear(2, 2),
    ],
    ids=["autoencoder", "unet", "pixart", "linear"],
)
def test_a_model_of_another_family_is_refused(model):
    with torch.device("meta"):
        state = model().state_dict()
    message = refusal(infos(state))
    assert message.startswith("not a checkpoint of SANA, its ControlNet or DC-AE")
    assert f"of {len(state)} tensors" in message


def test_a_discriminator_is_refused():
    heads = {f"heads.{index}.main.{name}": (8, 8) for index in range(4) for name in ("0.weight", "2.weight")}
    assert refusal(infos(heads)).startswith("not a checkpoint of SANA")


def test_pixarts_original_names_are_not_taken_for_sanas(reduced):
    # PixArt's blocks have the same attentions under the same names, and a plain MLP.
    tensors = {name: tensor for name, tensor in reduced("sana").tensors.items() if ".mlp." not in name or "t_e" in name}
    tensors |= {f"blocks.{index}.mlp.fc1.weight": torch.zeros(256, 64) for index in range(2)}
    assert refusal(infos(tensors)).startswith("not a checkpoint of SANA")


@pytest.mark.parametrize(
    ("one", "another"),
    [("sana", "dc-ae-sana"), ("sprint", "dc-ae-f32"), ("dc-ae-lite", "sana")],
)
def test_two_models_in_one_file_are_refused_with_both_named(reduced, one, another):
    message = refusal(infos({**reduced(one).tensors, **reduced(another).tensors}))
    assert message.startswith("the checkpoint is a mixture of models")
    assert "transformer in the original layout" in message
    assert "autoencoder in the original layout" in message


def test_a_transformer_beside_an_autoencoder_under_another_prefix_is_a_mixture(reduced):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in reduced("sprint").tensors.items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in reduced("dc-ae-sana").tensors.items()}
    assert 'under "first_stage_model."' in refusal(infos(tensors))


def test_a_half_converted_file_is_a_mixture(reduced):
    tensors = reduced("sana").tensors
    tensors["transformer_blocks.0.attn1.to_q.weight"] = torch.zeros(64, 64)
    message = refusal(infos(tensors))
    assert "original layout" in message
    assert "diffusers layout" in message
    assert "transformer_blocks.0.attn1.to_q.weight" in message


def test_another_kind_than_wanted_is_refused_and_said(reduced):
    autoencoder, transformer = infos(reduced("dc-ae-sana").tensors), infos(reduced("sana").tensors)
    assert refusal(autoencoder, kind="transformer") == (
        "the file holds no transformer but one autoencoder in the original layout"
    )
    for kind in ("autoencoder", "controlnet"):
        assert refusal(transformer, kind=kind) == f"the file holds no {kind} but one transformer in the original layout"


def test_quantised_weights_are_refused(reduced):
    tensors = infos(reduced("sana").tensors)
    name = "blocks.1.attn.qkv.weight"
    tensors[name] = TensorInfo(tensors[name].shape, torch.int8)
    assert f"{name} is torch.int8" in refusal(tensors)


def test_two_half_precisions_in_one_model_are_refused(reduced):
    tensors = infos(reduced("sana").tensors)
    for name, dtype in (("blocks.0.attn.qkv.weight", torch.float16), ("blocks.1.attn.qkv.weight", torch.bfloat16)):
        tensors[name] = TensorInfo(tensors[name].shape, dtype)
    assert "cannot be both float16 (blocks.0.attn.qkv.weight) and bfloat16 (blocks.1" in refusal(tensors)


def test_a_setting_that_the_model_does_not_have_is_refused(reduced):
    tensors = infos(reduced("sana").tensors)
    assert "no such setting: number_of_layers" in refusal(tensors, settings={"number_of_layers": 2})
    assert "no such setting" in refusal(tensors, settings={"residual_placement": "after"})


@pytest.mark.parametrize("value", [0, -1, "16", 1.5, True])
def test_a_size_that_is_no_size_is_refused(reduced, value):
    message = refusal(infos(reduced("sana").tensors), settings={"num_cross_attention_heads": value})
    assert message == f"num_cross_attention_heads must be a positive integer, got {value!r}"


@pytest.mark.parametrize("value", ["large", None, True, float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(reduced, value):
    """No tensor would contradict it, and the model would be of no use."""
    for name, setting in (("sprint", "timestep_scale"), ("dc-ae-f32", "scaling_factor")):
        message = refusal(infos(reduced(name).tensors), settings={setting: value})
        assert message == f"{setting} must be a number, got {value!r}"


def test_a_place_of_residuals_that_nobody_knows_is_refused(reduced):
    message = refusal(infos(reduced("controlnet").tensors), settings={"residual_placement": "between"})
    assert message == "residual_placement must be after or before, got 'between'"


def test_heads_that_do_not_divide_the_width_are_refused(reduced):
    message = refusal(infos(reduced("sana").tensors), settings={"attention_head_dim": 24})
    assert message == "the width 64 is not a whole number of attention heads of 24"


def test_a_block_of_a_huge_number_does_not_make_a_huge_model(reduced):
    tensors = {**reduced("sana").tensors, "blocks.9999.attn.proj.bias": torch.zeros(64)}
    assert recognise(infos(tensors)).config["num_layers"] == 2


@pytest.mark.parametrize("key", ["controlnet", "dc-ae-sana", "sana"])
def test_a_file_that_lacks_what_shows_its_sizes_is_refused_and_not_guessed(reduced, key):
    shows_size = ("scale_shift_table", "attn.proj.bias", "encoder.stages")
    tensors = {name: tensor for name, tensor in reduced(key).tensors.items() if not any(s in name for s in shows_size)}
    message = refusal(infos({name: tensor for name, tensor in tensors.items() if "cross_attn.proj" not in name}))
    assert "cannot be told" in message or "as many stages down as up" in message
