"""`from_single_file` of our classes: original files of every family, and what diffusers' own would give."""

import json
import logging
from typing import Any

import diffusers
import pytest
import torch
from checkpoint_files import alter_a_number
from safetensors.torch import save_file

from sana_sprint import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from sana_sprint.checkpoints.convert import Conversion, convert
from sana_sprint.quantisation.layers import QuantisedLayer

TRANSFORMERS = ["sana", "sana-1.5", "teacher", "sprint", "sprint-bare", "sana-2k"]
CONTROLNETS = ["controlnet"]
AUTOENCODERS = ["dc-ae-sana", "dc-ae-lite", "dc-ae-f32", "dc-ae-f64", "dc-ae-f128"]


def assert_equal(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)


def settings_of(model: diffusers.ModelMixin) -> dict[str, Any]:
    """The config as it is saved, without where it came from."""
    config = json.loads(model.to_json_string())
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def class_of(name: str) -> type:
    if name in TRANSFORMERS:
        return SanaTransformer2DModel
    return SanaControlNetModel if name in CONTROLNETS else AutoencoderDC


@pytest.mark.parametrize("name", TRANSFORMERS + CONTROLNETS + AUTOENCODERS)
def test_an_original_file_gives_the_model_that_its_conversion_gives(reduced, store, tmp_path, name):
    cls = class_of(name)
    source = store(reduced(name))
    convert(Conversion(source=source, output=tmp_path / "folder"))
    model, wanted = cls.from_single_file(str(source)), cls.from_pretrained(tmp_path / "folder")
    assert type(model) is cls
    assert_equal(model, wanted)
    assert settings_of(model) == settings_of(wanted)
    assert not model.training
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["sana", "dc-ae-sana"])
def test_where_diffusers_can_read_a_file_both_give_the_same_weights(reduced, store, tmp_path, name):
    ours, theirs = (
        (SanaTransformer2DModel, diffusers.SanaTransformer2DModel)
        if name == "sana"
        else (AutoencoderDC, diffusers.AutoencoderDC)
    )
    original = reduced(name)
    convert(Conversion(source=store(original), output=tmp_path / "folder"))
    reference = theirs.from_single_file(dict(original.tensors), config=str(tmp_path / "folder"))
    assert_equal(ours.from_single_file(dict(original.tensors)), reference)


def test_a_state_dict_a_folder_and_a_prefixed_file_give_the_same_model(reduced, store, tmp_path):
    original = reduced("sprint")
    source = store(original)
    model = SanaTransformer2DModel.from_single_file(source)
    convert(Conversion(source=source, output=tmp_path / "folder"))
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in original.tensors.items()}
    save_file(prefixed, tmp_path / "comfy.safetensors")
    for other in (
        original.tensors,
        {"state_dict": original.tensors},
        tmp_path / "folder",
        tmp_path / "comfy.safetensors",
    ):
        assert_equal(SanaTransformer2DModel.from_single_file(other), model)


def test_a_file_in_diffusers_layout_is_read_too(reduced, store, tmp_path):
    model = SanaTransformer2DModel.from_single_file(store(reduced("sprint")))
    model.save_pretrained(tmp_path / "folder")
    weights = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    assert_equal(SanaTransformer2DModel.from_single_file(weights), model)


def test_the_dtype_is_float32_or_the_one_asked_for(reduced, store):
    original = reduced("sprint")
    original.tensors.update({key: tensor.bfloat16() for key, tensor in original.tensors.items()})
    source = store(original)
    assert SanaTransformer2DModel.from_single_file(source).dtype == torch.float32
    for spelling in ("dtype", "torch_dtype"):
        model = SanaTransformer2DModel.from_single_file(source, **{spelling: torch.bfloat16})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    counting = AutoencoderDC.from_single_file(store(reduced("dc-ae-f32")), dtype=torch.float16)
    assert {tensor.dtype for tensor in counting.state_dict().values()} == {torch.float16, torch.int64}


def test_what_the_tensors_cannot_tell_comes_from_a_config_or_a_keyword(reduced, store, tmp_path):
    source = store(reduced("sprint-bare"))
    plain = SanaTransformer2DModel.from_single_file(source)
    changed = SanaTransformer2DModel.from_single_file(source, sample_size=16, guidance_embeds_scale=0.2)
    assert (plain.config.sample_size, changed.config.sample_size) == (32, 16)
    changed.save_config(tmp_path / "pipeline" / "transformer")
    known = SanaTransformer2DModel.from_single_file(source, config=str(tmp_path / "pipeline"), subfolder="transformer")
    assert (known.config.sample_size, known.config.guidance_embeds_scale) == (16, 0.2)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
@pytest.mark.parametrize("name", ["sprint", "dc-ae-sana"])
def test_a_file_is_quantised_like_the_folder_of_its_conversion(reduced, store, tmp_path, name, options, dtype):
    cls = SanaTransformer2DModel if name in TRANSFORMERS else AutoencoderDC
    source, config = store(reduced(name)), diffusers.BitsAndBytesConfig(**options)
    convert(Conversion(source=source, output=tmp_path / "folder"))
    model = cls.from_single_file(source, quantization_config=config, torch_dtype=dtype)
    wanted = cls.from_pretrained(tmp_path / "folder", quantization_config=config, torch_dtype=dtype)
    assert any(isinstance(module, QuantisedLayer) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in wanted.modules()]
    assert_equal(model, wanted)
    assert settings_of(model) == settings_of(wanted)
    assert (model.device, model.dtype, model.training) == (wanted.device, wanted.dtype, False)
    model.save_pretrained(tmp_path / "quantised")
    assert_equal(cls.from_pretrained(tmp_path / "quantised", torch_dtype=dtype), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="diffusers' own class would be quantised")
def test_a_quantised_single_file_leaves_diffusers_as_it_was(reduced, store, tmp_path):
    config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    model = SanaTransformer2DModel.from_single_file(store(reduced("sprint")), quantization_config=config, device="cpu")
    model.dequantize().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="No GPU found"):
        diffusers.SanaTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize(
    "options", [None, {}, {"llm_int8_has_fp16_weight": True}], ids=["plain", "8 bits", "8 bits of 16"]
)
@pytest.mark.parametrize("name", ["sprint", "dc-ae-f32"])
def test_the_model_does_not_depend_on_the_file_any_more(reduced, store, name, options):
    source = store(reduced(name))
    cls = SanaTransformer2DModel if name in TRANSFORMERS else AutoencoderDC
    config = options if options is None else diffusers.BitsAndBytesConfig(load_in_8bit=True, **options)
    model = cls.from_single_file(source, quantization_config=config, dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with source.open("r+b") as stream:
        stream.write(bytes(source.stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_loading_says_nothing_but_what_it_guesses(reduced, store, caplog):
    source = store(reduced("sprint"))
    with caplog.at_level(logging.WARNING):
        SanaTransformer2DModel.from_single_file(source, dtype=torch.bfloat16, cross_attention_head_dim=32)
    assert [record.getMessage() for record in caplog.records] == []
    with caplog.at_level(logging.WARNING):
        SanaTransformer2DModel.from_single_file(source)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{source}: width of the cross-attention heads")
    assert message.endswith("give cross_attention_head_dim to override")


def test_a_pth_file_whose_numbers_were_altered_is_refused(reduced, store):
    original = reduced("sprint")
    source = store(original)
    alter_a_number(source, original.tensors["blocks.1.attn.qkv.weight"])
    with pytest.raises(ValueError, match="is damaged"):
        SanaTransformer2DModel.from_single_file(source)


def test_registered_classes_read_sprint_too(reduced, store):
    import sana_sprint

    source = store(reduced("sprint"))
    sana_sprint.register()
    try:
        assert type(diffusers.SanaTransformer2DModel.from_single_file(source)) is SanaTransformer2DModel
    finally:
        sana_sprint.unregister()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"device_map": "auto"}, "takes no device_map here; convert the file"),
        ({"original_config": "model.yaml"}, "takes no original_config here"),
        ({"sample_sise": 16}, "no such setting: sample_sise"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(reduced, store, arguments, named):
    with pytest.raises(ValueError, match=named):
        SanaTransformer2DModel.from_single_file(store(reduced("sprint")), **arguments)


def test_a_file_of_another_model_or_with_tensors_missing_is_refused(reduced, store):
    source = store(reduced("dc-ae-sana"))
    with pytest.raises(ValueError, match="holds no transformer"):
        SanaTransformer2DModel.from_single_file(source)
    original = reduced("sprint")
    del original.tensors["blocks.1.attn.proj.bias"]
    with pytest.raises(ValueError, match=r"1 tensors are missing \(blocks.1.attn.proj.bias\)"):
        SanaTransformer2DModel.from_single_file(store(original))
    with pytest.raises(ValueError, match="holds something else than tensors: 'epoch'"):
        SanaTransformer2DModel.from_single_file({"epoch": 3})
    with pytest.raises(ValueError, match="needs a file"):
        SanaTransformer2DModel.from_single_file(None)
    with pytest.raises(FileNotFoundError, match="no file or folder ./missing.pth"):
        SanaTransformer2DModel.from_single_file("./missing.pth")
