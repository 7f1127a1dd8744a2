"""What a checkpoint is said to be, without reading its weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sana_sprint.checkpoints.convert import Conversion, convert
from sana_sprint.checkpoints.inspect import inspect_checkpoint

KINDS = {"controlnet": "controlnet", "dc": "autoencoder"}


def test_every_family_is_described_as_complete(original, store):
    (found,) = inspect_checkpoint(store(original))
    assert found.is_exact
    assert found.layout == "original"
    assert found.kind == KINDS.get(original.name.partition("-")[0], "transformer")
    assert found.num_tensors == len(original.tensors)
    assert found.num_bytes == sum(tensor.nbytes for tensor in original.tensors.values())
    assert sum(found.dtypes.values()) == sum(tensor.numel() for tensor in original.tensors.values())


def test_parameters_are_those_of_the_model_it_becomes(reduced, store, tmp_path):
    from sana_sprint import AutoencoderDC, SanaTransformer2DModel

    for name, cls in (("sprint", SanaTransformer2DModel), ("dc-ae-f32", AutoencoderDC)):
        (found,) = inspect_checkpoint(store(reduced(name)))
        assert found.num_parameters == sum(p.numel() for p in cls.from_config(found.config).parameters())


def test_every_fault_is_listed_by_its_name_in_the_file(reduced, store):
    original = reduced("sprint")
    for name in ("blocks.0.attn.proj.bias", "final_layer.linear.weight"):
        del original.tensors[name]
    original.tensors["blocks.0.extra.weight"] = torch.zeros(2)
    original.tensors["x_embedder.proj.bias"] = torch.zeros(3)
    original.tensors.update({f"module.{k}": original.tensors.pop(k) for k in list(original.tensors)})
    (found,) = inspect_checkpoint(store(original))
    assert not found.is_exact
    assert found.prefix == "module."
    assert set(found.missing) == {"module.blocks.0.attn.proj.bias", "module.final_layer.linear.weight"}
    assert found.unexpected == ("module.blocks.0.extra.weight",)
    assert found.misshaped == (("module.x_embedder.proj.bias", (3,), (64,)),)


def test_what_a_conversion_does_with_the_rest_is_told(reduced, store):
    (sprint,) = inspect_checkpoint(store(reduced("sprint")))
    assert sprint.aside == ("y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
    assert sprint.dropped == ("pos_embed",)
    (control,) = inspect_checkpoint(store(reduced("controlnet")))
    assert "blocks.1.attn.qkv.weight" in control.elsewhere


def test_a_guess_is_told_and_a_setting_ends_it(reduced, store):
    original = reduced("sprint")
    del original.tensors["pos_embed"]
    path = store(original)
    doubts = {doubt.setting: doubt.chosen for doubt in inspect_checkpoint(path)[0].doubts}
    assert doubts["sample_size"] == 32
    (found,) = inspect_checkpoint(path, settings={"sample_size": 16})
    assert {doubt.setting for doubt in found.doubts} == doubts.keys() - {"sample_size"}
    assert found.config["sample_size"] == 16


def test_a_pipelines_folder_is_described_part_by_part(tiny_pipeline_parts, tmp_path):
    from sana_sprint import SanaSprintPipeline

    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(tmp_path)
    transformer, vae = inspect_checkpoint(tmp_path)
    assert (transformer.kind, vae.kind) == ("transformer", "autoencoder")
    assert (transformer.layout, vae.layout) == ("diffusers", "diffusers")
    assert transformer.is_exact
    assert vae.is_exact


def test_a_converted_folder_is_described_with_what_lies_beside_it(reduced, store, tmp_path):
    convert(Conversion(source=store(reduced("sprint")), output=tmp_path / "folder"))
    (found,) = inspect_checkpoint(tmp_path / "folder")
    assert found.is_exact
    assert len(found.aside) == 3


def test_a_description_is_json(original, store):
    (found,) = inspect_checkpoint(store(original))
    document = json.loads(json.dumps(found.as_document()))
    assert document["is_exact"] is True
    assert document["num_parameters"] == found.num_parameters
    assert document["config"].keys() == found.config.keys()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"encoder.weight": torch.zeros(2)}, "not a checkpoint of SANA"),
        (
            {"heads.0.main.0.0.weight_orig": torch.zeros(2, 2, 1), "heads.0.cls.bias": torch.zeros(1)},
            "not a checkpoint",
        ),
    ],
)
def test_another_models_file_is_refused_by_name(tmp_path, tensors, named):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=named) as caught:
        inspect_checkpoint(tmp_path / "other.safetensors")
    assert "other.safetensors" in str(caught.value)
