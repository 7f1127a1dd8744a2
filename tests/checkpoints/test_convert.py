"""Checkpoints through files: there and back bit for bit, folders that load everywhere, and no output after an error."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoint_files import alter_a_number, assert_equal, contents, names_in, run
from safetensors.torch import load_file, save_file

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.convert import Conversion, convert
from sana_sprint.checkpoints.reader import ASIDE_FILE
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

ASIDE = {"y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"}
CLASSES = {
    "SanaTransformer2DModel": (SanaTransformer2DModel, diffusers.SanaTransformer2DModel),
    "AutoencoderDC": (AutoencoderDC, diffusers.AutoencoderDC),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_there_and_back_through_files_is_bitwise_the_identity(original, store, tmp_path, ending):
    tensors = {key: value.bfloat16() if value.is_floating_point() else value for key, value in original.tensors.items()}
    original.tensors.update(tensors)
    there = run(store(original), tmp_path / "folder").source
    run(tmp_path / "folder", tmp_path / f"back{ending}", to="original")
    left_out = {*there.dropped, *there.elsewhere}
    assert_equal(contents(tmp_path / f"back{ending}"), {k: v for k, v in tensors.items() if k not in left_out})


@pytest.mark.parametrize("name", ["sana", "sana-1.5", "sana-2k", "sprint", "dc-ae-sana", "dc-ae-lite", "dc-ae-f32"])
def test_a_converted_folder_loads_in_both_libraries_with_equal_output(reduced, store, tmp_path, name):
    run(store(reduced(name)), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    outputs = []
    for cls in CLASSES[config["_class_name"]]:
        model, report = cls.from_pretrained(tmp_path / "folder", output_loading_info=True)
        assert not any(report.values()), report
        outputs.append(output_of(model, config))
    # Two implementations in float32; 1e-4 as for the autoencoder, the less exact of the two.
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 * outputs[1].abs().max()


@torch.no_grad()
def output_of(model: torch.nn.Module, config: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if config["_class_name"] == "AutoencoderDC":
        return model(torch.randn(1, 3, 64, 64, generator=generator)).sample
    guidance = {"guidance": torch.tensor([0.4, 0.5])} if config["guidance_embeds"] else {}
    latents = torch.randn(2, config["in_channels"], 4, 6, generator=generator)
    caption = torch.randn(2, 3, config["caption_channels"], generator=generator)
    return model(latents, caption, torch.tensor([0.2, 0.7]), **guidance).sample


@pytest.mark.parametrize("name", ["sprint", "teacher", "sana-2k", "dc-ae-sana", "dc-ae-f128"])
def test_a_folder_is_what_save_pretrained_writes(reduced, store, tmp_path, name):
    run(store(reduced(name)), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    ours, _ = CLASSES[config["_class_name"]]
    ours.from_pretrained(tmp_path / "folder").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == {key: value for key, value in saved.items() if key != "_name_or_path"}
    assert names_in(tmp_path / "saved") == [name for name in names_in(tmp_path / "folder") if name != ASIDE_FILE]


def test_shards_load_and_convert_back(reduced, store, tmp_path):
    source = store(reduced("sprint"))
    run(source, tmp_path / "whole")
    run(source, tmp_path / "shards", shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("diffusion_pytorch_model-*.safetensors"))) > 2
    assert_equal(contents(tmp_path / "shards"), contents(tmp_path / "whole"))
    loaded = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "shards").state_dict()
    assert_equal(loaded, {key: value for key, value in contents(tmp_path / "whole").items() if key not in ASIDE})


def test_a_dtype_is_that_of_every_weight_and_of_no_count(reduced, store, tmp_path):
    run(store(reduced("dc-ae-f32")), tmp_path / "folder", dtype=torch.float16)
    dtypes = {k.rpartition(".")[2]: tensor.dtype for k, tensor in contents(tmp_path / "folder").items()}
    assert dtypes.pop("num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {torch.float16}


def test_the_layout_may_stay_when_the_dtype_changes(reduced, store, tmp_path):
    run(store(reduced("sprint")), tmp_path / "folder")
    run(tmp_path / "folder", tmp_path / "half", dtype=torch.bfloat16)
    assert_equal(contents(tmp_path / "half"), {k: v.bfloat16() for k, v in contents(tmp_path / "folder").items()})
    configs = [(tmp_path / name / "config.json").read_text() for name in ("folder", "half")]
    assert configs[0] == configs[1]


def test_what_has_no_place_in_the_model_is_kept_beside_it(reduced, store, tmp_path):
    original = reduced("sprint")
    report = run(store(original), tmp_path / "folder")
    assert set(report.source.aside) == ASIDE
    assert_equal(load_file(tmp_path / "folder" / ASIDE_FILE), {key: original.tensors[key] for key in ASIDE})


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model."])
def test_names_behind_a_prefix_are_converted_as_if_it_were_not_there(reduced, store, tmp_path, prefix):
    original = reduced("sprint")
    run(store(original), tmp_path / "bare")
    save_file({prefix + key: value for key, value in original.tensors.items()}, tmp_path / "community.safetensors")
    run(tmp_path / "community.safetensors", tmp_path / "prefixed")
    assert_equal(contents(tmp_path / "prefixed"), contents(tmp_path / "bare"))


def test_the_averaged_weights_of_a_snapshot_are_taken_when_asked_for(reduced, store, tmp_path):
    original = reduced("sana")
    averaged = {key: value * 0.5 for key, value in original.tensors.items()}
    snapshot = {"state_dict": original.tensors, "state_dict_ema": averaged, "optimizer": {"state": {}}, "step": 3}
    source = store(original, snapshot)
    run(source, tmp_path / "plain")
    run(source, tmp_path / "averaged", ema=True)
    assert_equal(contents(tmp_path / "averaged"), {k: v * 0.5 for k, v in contents(tmp_path / "plain").items()})


def test_a_controlnets_file_gives_the_control_or_the_base(reduced, store, tmp_path):
    source = store(reduced("controlnet"))
    run(source, tmp_path / "control")
    config = json.loads((tmp_path / "control" / "config.json").read_text())
    assert (config["_class_name"], config["residual_placement"]) == ("SanaControlNetModel", "before")
    control, report = SanaControlNetModel.from_pretrained(tmp_path / "control", output_loading_info=True)
    assert not any(report.values()), report
    assert len(control.transformer_blocks) == config["num_layers"]
    run(source, tmp_path / "base", kind="transformer")
    base, report = SanaTransformer2DModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(base.patch_embed.proj.weight, control.patch_embed.proj.weight)
    assert torch.equal(base.transformer_blocks[0].attn1.to_k.weight, control.base_block.attn1.to_k.weight)
    run(source, tmp_path / "theirs", settings={"residual_placement": "after"})
    _, report = diffusers.SanaControlNetModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report


def test_settings_are_written_to_the_config(reduced, store, tmp_path):
    source = store(reduced("sprint-bare"))
    run(source, tmp_path / "folder", settings={"sample_size": 16, "guidance_embeds_scale": 0.2})
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["sample_size"], config["guidance_embeds_scale"]) == (16, 0.2)


# Errors


def assert_no_output(tmp_path: Path) -> None:
    assert names_in(tmp_path) == ["in"]


def spoil(tensors: dict[str, torch.Tensor], way: str) -> None:
    weight = "blocks.1.attn.qkv.weight"
    if way == "missing":
        del tensors[weight]
    elif way == "misshaped":
        tensors[weight] = tensors[weight][:-3]
    elif way == "unexpected":
        tensors["blocks.1.attn.lora.weight"] = torch.zeros(2)
    elif way == "mixed":
        tensors["encoder.stages.0.op_list.0.main.conv1.conv.weight"] = torch.zeros(4, 4, 3, 3)
    elif way == "integers":
        tensors[weight] = torch.zeros(tensors[weight].shape, dtype=torch.int8)
    elif way == "infinite":
        tensors[weight][3, 5] = float("inf")
    elif way == "half an aside":
        del tensors["logvar_linear.bias"]


@pytest.mark.parametrize(
    ("way", "named"),
    [
        ("missing", r"is no whole SANA-Sprint .*1 tensors are missing \(blocks.1.attn.qkv.weight\)"),
        ("misshaped", r"1 are of another shape \(blocks.1.attn.qkv.weight 189x64, not 192x64\)"),
        ("unexpected", r"1 are unexpected \(blocks.1.attn.lora.weight\)"),
        ("mixed", "mixture"),
        ("integers", "floating-point"),
        ("infinite", "blocks.1.attn.qkv.weight holds NaN or infinity"),
        ("half an aside", r"missing \(logvar_linear.bias\)"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(reduced, store, tmp_path, way, named):
    original = reduced("sprint")
    spoil(original.tensors, way)
    with pytest.raises(ValueError, match=named) as caught:
        run(store(original), tmp_path / "folder")
    assert "\n" not in str(caught.value)
    assert "model.pth" in str(caught.value)
    assert_no_output(tmp_path)


def test_another_models_file_is_refused(store, reduced, tmp_path):
    original = reduced("sana")
    original.tensors.clear()
    original.tensors.update({f"model.layers.{i}.mlp.weight": torch.zeros(2, 2) for i in range(4)})
    with pytest.raises(ValueError, match="not a checkpoint of SANA"):
        run(store(original), tmp_path / "folder")
    assert_no_output(tmp_path)


def test_an_index_or_a_weights_file_is_converted_with_what_lies_beside_it(reduced, store, tmp_path):
    source = store(reduced("teacher"))
    run(source, tmp_path / "whole")
    run(source, tmp_path / "shards", shard_bytes=100_000)
    for name in ("whole/diffusion_pytorch_model.safetensors", "shards/diffusion_pytorch_model.safetensors.index.json"):
        run(tmp_path / name, tmp_path / "back.pth", to="original", force=True)
        assert_equal(contents(tmp_path / "back.pth"), {k: v for k, v in contents(source).items() if k != "pos_embed"})
        run(tmp_path / name, tmp_path / "copy", force=True)
        assert (tmp_path / "copy" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()


def test_a_kind_that_is_not_there_is_refused(store, reduced, tmp_path):
    with pytest.raises(ValueError, match="holds no autoencoder but one transformer"):
        run(store(reduced("sana")), tmp_path / "folder", kind="autoencoder")
    assert_no_output(tmp_path)


def test_numbers_that_were_altered_on_disk_are_found_before_anything_is_written(store, reduced, tmp_path):
    original = reduced("sprint")
    source = store(original)
    alter_a_number(source, original.tensors["blocks.1.attn.qkv.weight"])
    with pytest.raises(ValueError, match="is damaged"):
        run(source, tmp_path / "folder")
    assert_no_output(tmp_path)


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_ctrl_c_leaves_nothing(store, reduced, tmp_path, to):
    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    job = Conversion(source=store(reduced("sprint")), output=tmp_path / ("a.pth" if to == "original" else "a"), to=to)
    with pytest.raises(KeyboardInterrupt):
        convert(job, progress=lambda total: interrupt)
    assert_no_output(tmp_path)


@pytest.mark.parametrize(("output", "to"), [("a", "diffusers"), ("a.pth", "original"), ("a.safetensors", "original")])
def test_a_full_disk_is_one_line_and_leaves_nothing(store, reduced, tmp_path, output, to):
    source = store(reduced("sprint"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            run(source, tmp_path / output, to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / output)
    assert_no_output(tmp_path)


def test_an_existing_output_is_replaced_by_force_only(store, reduced, tmp_path):
    source = store(reduced("sprint"))
    run(source, tmp_path / "folder")
    with pytest.raises(ValueError, match="exists already"):
        run(source, tmp_path / "folder", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in contents(tmp_path / "folder").values()} == {torch.float32}
    run(source, tmp_path / "folder", dtype=torch.bfloat16, force=True)
    assert {tensor.dtype for tensor in contents(tmp_path / "folder").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("source", "output", "to"),
    [
        ("folder", "folder", "diffusers"),
        ("folder", "folder/diffusion_pytorch_model-00001-of-00003.safetensors", "original"),
        ("folder/diffusion_pytorch_model.safetensors.index.json", "folder", "diffusers"),
        (
            "folder/diffusion_pytorch_model.safetensors.index.json",
            "folder/diffusion_pytorch_model-00001-of-00003.safetensors",
            "original",
        ),
        ("pipeline", "pipeline/transformer", "diffusers"),
        ("link.safetensors", "link.safetensors", "original"),
    ],
)
def test_what_is_read_is_never_replaced_by_what_is_made_of_it(reduced, store, tmp_path, source, output, to):
    run(store(reduced("sana")), tmp_path / "in" / "folder", shard_bytes=300_000)
    shutil.copytree(tmp_path / "in" / "folder", tmp_path / "in" / "pipeline" / "transformer")
    save_file(reduced("sana").tensors, tmp_path / "in" / "file.safetensors")
    (tmp_path / "in" / "link.safetensors").symlink_to(tmp_path / "in" / "file.safetensors")
    assert (tmp_path / "in" / output).exists()
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="would be replaced by what is made of it"):
        run(tmp_path / "in" / source, tmp_path / "in" / output, to=to, force=True, dtype=torch.float16)
    assert {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output": "a", "to": "original"}, "must end in .pth"),
        ({"output": "a.pth"}, "must not end in .pth"),
        ({"output": "a.pth", "to": "original", "shard_bytes": 10}, "no shards and no pipeline"),
        ({"output": "a.pth", "to": "original", "full_pipeline": True}, "no shards and no pipeline"),
        ({"output": "a", "shard_bytes": 0}, "at least one byte, got 0"),
        ({"output": "a", "full_pipeline": True}, "name all three"),
        ({"output": "a", "vae": Path("vae")}, "not asked for"),
        ({"output": "a", "scheduler": "scm"}, "not asked for"),
        ({"output": "in", "force": True}, "would be replaced by what is made of it"),
        ({"output": "a", "settings": {"num_heads": 3}}, "no such setting: num_heads"),
        ({"output": "a", "settings": {"num_layers": "many"}}, "num_layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(store, reduced, tmp_path, options, named):
    source = store(reduced("sprint"))
    with pytest.raises(ValueError, match=named):
        run(source, **{**options, "output": tmp_path / options["output"]})
    assert_no_output(tmp_path)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"num_layers": 3}, "missing"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, for"),
        ({"num_layers": "two"}, "num_layers"),
        ({"num_attention_heads": None}, "there is no transformer of the sizes|another kind"),
        ({"surprise": 1}, "no such setting: surprise"),
    ],
)
def test_a_config_that_contradicts_its_weights_is_refused(store, reduced, tmp_path, entries, named):
    run(store(reduced("sana")), tmp_path / "in" / "folder")
    path = tmp_path / "in" / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(ValueError, match=named):
        run(tmp_path / "in" / "folder", tmp_path / "out", dtype=torch.bfloat16)
    assert_no_output(tmp_path)
