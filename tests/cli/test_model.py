"""Model names to folders and fingerprints; devices and number formats to those of torch."""

import json

import pytest
import torch

from sana_sprint.cli.model import choose_device, choose_dtype, find_model, fingerprint


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of a pipeline, as far as a fingerprint looks."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaSprintPipeline", "vae": ["a", "b"]}))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "vae" / "weights.safetensors").write_bytes(bytes(3 * 2**20))
    return tmp_path


def overwrite(path, position, value=b"x"):
    with path.open("r+b") as stream:
        stream.seek(position)
        stream.write(value)


@pytest.mark.parametrize("position", [0, 2**20 - 1, 2 * 2**20, 3 * 2**20 - 1])
def test_a_fingerprint_changes_with_either_end_of_the_weights(folder, position):
    before = fingerprint(folder)
    overwrite(folder / "vae" / "weights.safetensors", position)
    assert fingerprint(folder) != before


def test_a_fingerprint_changes_with_configs_names_and_sizes(folder):
    seen = {fingerprint(folder)}
    overwrite(folder / "vae" / "config.json", 0, b"[]")
    seen.add(fingerprint(folder))
    (folder / "vae" / "config.json").rename(folder / "vae" / "other.json")
    seen.add(fingerprint(folder))
    overwrite(folder / "vae" / "weights.safetensors", 3 * 2**20, b"\0")
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_a_fingerprint_does_not_look_at_the_place_or_at_documents(folder, tmp_path_factory):
    before = fingerprint(folder)
    (folder / "README.md").write_text("about")
    (folder / "vae" / "training.log").write_text("loss")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.json").write_text("{}")
    moved = folder.rename(tmp_path_factory.mktemp("elsewhere") / "moved")
    assert fingerprint(moved) == before


def test_a_small_change_inside_a_file_of_under_two_mebibytes_is_seen_wherever_it_is(folder):
    weights = folder / "vae" / "weights.safetensors"
    weights.write_bytes(bytes(2**20 + 100))
    before = fingerprint(folder)
    overwrite(weights, 2**20 + 50)
    assert fingerprint(folder) != before


def test_a_folder_without_a_pipeline_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json"):
        find_model(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*missing; --model takes"):
        find_model(str(tmp_path / "missing"))


def test_a_broken_model_index_is_refused_by_name(folder):
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is not valid JSON"):
        find_model(str(folder))


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    with pytest.raises(ValueError, match=f"cannot draw on --device {device}"):
        choose_device(device)


def test_auto_is_bfloat16_on_cuda_and_float32_elsewhere():
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_is_cuda_where_there_is_one():
    assert choose_device("auto").type == "cuda"
