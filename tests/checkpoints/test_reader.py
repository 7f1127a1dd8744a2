"""Files of every kind to tensors: intact ones of each container, and a line for each thing that may be wrong."""

import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_sprint.checkpoints.reader import ASIDE_FILE, Checkpoint, open_checkpoint

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.tensor(7),
    "d": torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(1)).half(),
}


def contents(path: Path, **options) -> dict[str, torch.Tensor]:
    with open_checkpoint(path, **options) as checkpoint:
        assert {k: (i.shape, i.dtype) for k, i in checkpoint.tensors.items()} == {
            k: (tuple(checkpoint.read(k).shape), checkpoint.read(k).dtype) for k in checkpoint.tensors
        }
        checkpoint.check_data()
        return {key: checkpoint.read(key).clone() for key in checkpoint.tensors}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted)


def refusal(path: Path, **options) -> str:
    """The message that a file is refused with: one line that names it."""
    with pytest.raises(ValueError) as caught, open_checkpoint(path, **options) as checkpoint:
        checkpoint.check_data()
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.fixture
def pth(tmp_path) -> Path:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": TENSORS}, path)
    return path


@pytest.mark.parametrize("root", [TENSORS, {"state_dict": TENSORS}, {"state_dict": OrderedDict(TENSORS), "epoch": 3}])
@pytest.mark.parametrize("ending", [".pth", ".pt", ".ckpt", ".bin", ""])
def test_a_state_dict_is_read_bare_or_wrapped_whatever_its_files_ending(tmp_path, root, ending):
    torch.save(root, tmp_path / f"model{ending}")
    assert_equal(contents(tmp_path / f"model{ending}"), TENSORS)


def test_a_safetensors_file_is_read_whatever_its_ending(tmp_path):
    for name in ("model.safetensors", "model.pth"):
        save_file(TENSORS, tmp_path / name)
        assert_equal(contents(tmp_path / name), TENSORS)


def test_a_pth_file_under_a_name_of_safetensors_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "model.safetensors")
    assert "rename it to end in .pth" in refusal(tmp_path / "model.safetensors")


def test_of_a_training_snapshot_the_weights_are_read_and_nothing_else_is_built(tmp_path):
    averaged = {key: tensor + 1 for key, tensor in TENSORS.items()}
    snapshot = {
        "state_dict": {key: torch.nn.Parameter(tensor, requires_grad=False) for key, tensor in TENSORS.items()},
        "state_dict_ema": averaged,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1}],
        },
        "rng_state": {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()},
        "loss": np.float64(0.5),
        "epoch": 2,
    }
    torch.save(snapshot, tmp_path / "epoch_2_step_10.pth")
    assert_equal(contents(tmp_path / "epoch_2_step_10.pth"), TENSORS)
    assert_equal(contents(tmp_path / "epoch_2_step_10.pth", ema=True), averaged)


def test_averaged_weights_that_are_not_there_are_an_error(pth, tmp_path):
    assert "no averaged weights" in refusal(pth, ema=True)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert "no averaged weights" in refusal(tmp_path / "model.safetensors", ema=True)


def test_tensors_that_share_memory_or_are_transposed_are_read_as_they_were(tmp_path):
    whole = torch.arange(24.0)
    tensors = {"part": whole[3:9], "turned": whole.reshape(4, 6).T, "all": whole}
    torch.save(tensors, tmp_path / "model.pth")
    assert_equal(contents(tmp_path / "model.pth"), tensors)


def test_reading_more_than_is_kept_mapped_changes_nothing(pth, monkeypatch):
    monkeypatch.setattr("sana_sprint.checkpoints.reader._REMAP_BYTES", 20)
    assert_equal(contents(pth), TENSORS)


def write_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    homes = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(TENSORS)}
    for name in set(homes.values()):
        save_file({key: TENSORS[key] for key, home in homes.items() if home == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return index


def test_shards_are_read_through_their_index_or_their_folder(tmp_path):
    assert_equal(contents(write_shards(tmp_path / "sharded")), TENSORS)
    assert_equal(contents(tmp_path / "sharded"), TENSORS)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    index = write_shards(tmp_path)
    intact = json.loads(index.read_text())
    for change, named in (
        ({"a": "../model-0.safetensors"}, "outside its folder"),
        ({"a": "model-7.safetensors", "c": "model-7.safetensors"}, "not there: model-7.safetensors"),
        ({"a": "model-1.safetensors"}, "disagree about 1 tensors, a among"),
        ({"a": 3}, "no weight_map of file names"),
    ):
        index.write_text(json.dumps({"weight_map": {**intact["weight_map"], **change}}))
        assert named in refusal(index)
    for text, named in (("{", "not valid JSON"), ("[]", "no JSON object"), ("{}", "names no shards"), ("\xff", "JSON")):
        index.write_bytes(text.encode("latin1"))
        assert named in refusal(index)


def test_a_folder_gives_its_config_and_what_was_kept_beside_it(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / ASIDE_FILE)
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == {"_class_name": "SanaTransformer2DModel"}
        assert checkpoint.tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_what_lies_beside_weights_belongs_to_them_when_they_are_named_themselves(tmp_path, name):
    save_file({"a": TENSORS["a"]}, tmp_path / name)
    save_file({"b": TENSORS["b"]}, tmp_path / ASIDE_FILE)
    (tmp_path / "config.json").write_text('{"num_layers": 3}')
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert checkpoint.config == {"num_layers": 3}
        assert checkpoint.tensors.keys() == {"a", "b"}
        assert checkpoint.paths == [tmp_path / name, tmp_path / ASIDE_FILE]


def test_what_lies_beside_a_file_of_another_name_has_nothing_to_do_with_it(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "community.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / ASIDE_FILE)
    (tmp_path / "config.json").write_text('{"num_layers": 3}')
    with open_checkpoint(tmp_path / "community.safetensors") as checkpoint:
        assert checkpoint.config is None
        assert checkpoint.tensors.keys() == {"a"}


def test_a_tensor_that_two_files_hold_is_an_error(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / ASIDE_FILE)
    with pytest.raises(ValueError, match="holds a once more"), open_checkpoint(tmp_path):
        pass


def test_of_a_pipelines_folder_the_component_asked_for_is_read(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for name, key in (("transformer", "a"), ("vae", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({key: TENSORS[key]}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    assert contents(tmp_path).keys() == {"a"}
    assert contents(tmp_path, component="vae").keys() == {"b"}
    assert "controlnet/config.json is missing" in refusal(tmp_path, component="controlnet")


def test_a_folder_without_weights_or_with_several_is_refused(tmp_path):
    assert "holds no weights" in refusal(tmp_path)
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        save_file(TENSORS, tmp_path / name)
    assert "model.bf16.safetensors, model.fp16.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("plain", ["diffusion_pytorch_model", "model"])
def test_of_several_variants_the_one_without_a_name_is_read(tmp_path, plain):
    save_file({"a": TENSORS["a"].half()}, tmp_path / f"{plain}.fp16.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / f"{plain}.safetensors")
    assert_equal(contents(tmp_path), {"a": TENSORS["a"]})


class Hostile:
    """Pickled as a call that makes a file: a checkpoint that runs a program of its own."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("place", ["root", "beside", "inside"])
def test_a_file_that_would_run_a_program_is_refused_and_nothing_runs(tmp_path, place):
    witness = tmp_path / "witness"
    hostile = Hostile(witness)
    root = {
        "root": hostile,
        "beside": {"state_dict": TENSORS, "config": hostile},
        "inside": {"state_dict": {**TENSORS, "e": hostile}},
    }[place]
    torch.save(root, tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert "system would have to be called" in message
    assert "nothing that a checkpoint names is ever run" in message
    assert not witness.exists()


def test_a_bare_pickle_and_a_file_of_an_old_torch_are_refused_unopened(tmp_path):
    witness = tmp_path / "witness"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Hostile(witness)))
    assert "plain pickle, which is a program" in refusal(tmp_path / "bare.pth")
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tmp_path / "old.pth")
    assert not witness.exists()


def test_a_program_of_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pt"))
    assert "TorchScript program" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("root", "named"),
    [
        ([1, 2], "holds a list and no state dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": {**TENSORS, "e": 3}}, "'e' is no tensor of plain numbers"),
        ({"state_dict": {**TENSORS, 5: TENSORS["a"]}}, "'5' is no tensor of plain numbers"),
        ({"state_dict": {"e": torch.zeros(2, 2).to_sparse()}}, "'e' is no tensor of plain numbers"),
        ({"state_dict": {"e": torch.empty(2, device="meta")}}, "'e' is no tensor of plain numbers"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_refused(tmp_path, root, named):
    torch.save(root, tmp_path / "model.pth")
    assert named in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "neither torch.save nor safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00", "neither torch.save nor safetensors"),
        (struct.pack("<Q", 2**60) + b"{", "no intact safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content, named, ending):
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    assert named in refusal(path)


def test_another_programs_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("document.xml", "text")
    assert "torch.save did not write it" in refusal(tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("packed/data.pkl", bytes(10**6))
    assert "torch.save did not write it" in refusal(tmp_path / "packed.pth")


def test_a_byte_that_was_altered_in_a_pth_file_is_found_even_among_the_numbers(pth):
    data = bytearray(pth.read_bytes())
    data[data.find(TENSORS["a"].numpy().tobytes()) + 5] ^= 1
    pth.write_bytes(data)
    assert "damaged" in refusal(pth)


def test_a_pth_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": TENSORS}, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(contents(tmp_path / "model.pth"), TENSORS)


def test_nothing_at_a_path_is_an_error_that_names_it(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="no file or folder .*missing.pth"),
        open_checkpoint(tmp_path / "missing.pth"),
    ):
        pass


def test_an_unknown_dtype_of_safetensors_is_refused(tmp_path):
    header = b'{"a":{"dtype":"U16","shape":[1],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    assert "tensor a is of dtype U16" in refusal(tmp_path / "model.safetensors")


def test_a_closed_checkpoint_has_nothing_to_read(pth):
    with open_checkpoint(pth) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
    with pytest.raises(KeyError):
        checkpoint.read("a")
