"""Tensors to files one after the other: as torch and safetensors write them, in shards as diffusers does."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sana_sprint.checkpoints.entries import Entry
from sana_sprint.checkpoints.plan import Move
from sana_sprint.checkpoints.reader import ASIDE_FILE, open_checkpoint
from sana_sprint.checkpoints.writer import entries_of, in_shards, write_model, write_original

RANDOM = torch.Generator().manual_seed(0)
TENSORS = {
    "half": torch.randn(5, generator=RANDOM).half(),  # ten bytes: what follows would lie askew
    "single": torch.randn(3, 4, generator=RANDOM),
    "brain": torch.randn(2, 3, 1, 1, generator=RANDOM).bfloat16(),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 3),
    "double": torch.randn(2, generator=RANDOM).double(),
    "größe.weight": torch.randn(7, 2, generator=RANDOM).T,
}


def entries(tensors: dict[str, torch.Tensor] = TENSORS) -> list[Entry]:
    return [
        Entry(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, make=lambda tensor=tensor: tensor)
        for key, tensor in tensors.items()
    ]


def ignore(num_bytes: int) -> None:
    pass


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_written_for_it_mapped_or_not(tmp_path, mmap):
    write_original(tmp_path / "model.pth", entries(), ignore)
    loaded = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap)
    assert loaded.keys() == {"state_dict"}
    assert_equal(loaded["state_dict"], TENSORS)
    assert all(tensor.is_contiguous() for tensor in loaded["state_dict"].values())


def test_tensors_of_a_torch_file_are_aligned_and_carry_checksums(tmp_path):
    write_original(tmp_path / "model.pth", entries(), ignore)
    loaded = torch.load(tmp_path / "model.pth", weights_only=True, mmap=True)["state_dict"]
    assert {tensor.data_ptr() % 64 for tensor in loaded.values() if tensor.numel()} == {0}
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.testzip() is None
        assert all(record.CRC for record in archive.infolist() if record.file_size)


def test_a_file_of_ours_has_the_records_of_torchs_own(tmp_path):
    torch.save({"state_dict": TENSORS}, tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        theirs = {record.filename for record in archive.infolist()}
    (tmp_path / "model.pth").unlink()
    write_original(tmp_path / "model.pth", entries(), ignore)
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        ours = {record.filename for record in archive.infolist()}
    assert ours <= theirs
    # What says when and how torch wrote a file is not needed to read it.
    assert {name.rpartition("/")[2] for name in theirs - ours} <= {
        ".format_version",
        ".storage_alignment",
        "serialization_id",
    }


def test_safetensors_reads_what_is_written_for_it(tmp_path):
    write_original(tmp_path / "model.safetensors", entries(), ignore)
    assert_equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_progress_adds_up_to_all_bytes(tmp_path):
    for name in ("model.pth", "model.safetensors"):
        told: list[int] = []
        write_original(tmp_path / name, entries(), told.append)
        assert sum(told) == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_tensor_is_made_when_its_turn_comes(tmp_path):
    made: list[str] = []

    def make(key: str) -> torch.Tensor:
        made.append(key)
        return TENSORS[key]

    lazy = [
        Entry(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, make=lambda key=key: make(key))
        for key, tensor in TENSORS.items()
    ]
    counts: list[int] = []
    write_original(tmp_path / "model.pth", lazy, lambda num_bytes: counts.append(len(made)))
    assert counts == list(range(1, len(TENSORS) + 1))


def test_shards_hold_at_most_their_size_and_a_larger_tensor_its_own():
    sizes = {"a": 4, "b": 4, "c": 12, "d": 2, "e": 6, "f": 8}
    tensors = {key: torch.zeros(size, dtype=torch.float64) for key, size in sizes.items()}
    shards = in_shards(entries(tensors), shard_bytes=64)
    assert [[entry.key for entry in shard] for shard in shards] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def write(folder: Path, shard_bytes: int, aside: dict[str, torch.Tensor] | None = None) -> None:
    write_model(
        folder, {"_class_name": "Model"}, entries(), entries(aside or {}), shard_bytes=shard_bytes, advance=ignore
    )


def test_a_folder_is_named_as_diffusers_names_it(tmp_path):
    write(tmp_path / "one", 10**9)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    write(tmp_path / "many", 60)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 1
    assert names == [
        f"diffusion_pytorch_model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)
    ]
    index = json.loads((tmp_path / "many" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert set(index["weight_map"].values()) == set(names)


@pytest.mark.parametrize("shard_bytes", [1, 60, 10**9])
def test_a_folder_gives_back_what_was_written_with_what_was_kept_aside(tmp_path, shard_bytes):
    aside = {"y_embedder.y_embedding": torch.ones(2, 3)}
    write(tmp_path / "out", shard_bytes, aside)
    assert load_file(tmp_path / "out" / ASIDE_FILE).keys() == aside.keys()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert_equal({key: checkpoint.read(key) for key in checkpoint.tensors}, {**TENSORS, **aside})


@pytest.fixture
def make_entry(tmp_path):
    """The one entry that a move makes of stored tensors."""

    def make(tensors: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        torch.save(tensors, tmp_path / "model.pth")
        with open_checkpoint(tmp_path / "model.pth") as checkpoint:
            (entry,) = entries_of([Move("target", tuple(tensors), shape)], checkpoint, dtype)
            assert (entry.key, entry.shape) == ("target", shape)
            made = entry.make()
            assert made.dtype == entry.dtype
            return made.clone()

    return make


def test_numbers_are_cast_and_whole_numbers_are_not(make_entry):
    assert make_entry({"a": torch.rand(3)}, (3,), torch.bfloat16).dtype == torch.bfloat16
    assert make_entry({"a": torch.rand(3).half()}, (3,), None).dtype == torch.float16
    assert make_entry({"a": torch.tensor(3)}, (), torch.bfloat16).dtype == torch.int64


def test_parts_of_two_dtypes_are_joined_without_loss(make_entry):
    parts = {"a": torch.rand(2).half(), "b": torch.rand(2).bfloat16()}
    assert torch.equal(make_entry(parts, (4,), None), torch.cat([part.float() for part in parts.values()]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused_with_its_tensor(make_entry, value):
    tensor = torch.zeros(2**20 + 3)
    tensor[-1] = value
    with pytest.raises(ValueError, match="model.pth: weight holds NaN or infinity"):
        make_entry({"weight": tensor}, tuple(tensor.shape), None)


def test_a_number_that_the_dtype_cannot_hold_is_refused(make_entry):
    with pytest.raises(ValueError, match="weight holds numbers too large for float16"):
        make_entry({"weight": torch.tensor([1e5])}, (1,), torch.float16)


def test_a_dtype_of_eight_bits_needs_another_to_be_cast_to(make_entry):
    stored = {"weight": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match="stored as torch.float8_e4m3fn; give a dtype"):
        make_entry(stored, (2,), None)
    assert torch.equal(make_entry(stored, (2,), torch.bfloat16), torch.tensor([1.0, 2.0]).bfloat16())
