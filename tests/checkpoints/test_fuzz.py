"""Hundreds of damaged checkpoints: none hangs, and none is converted to anything but what the intact one is."""

import json
import random
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana_sprint.checkpoints.convert import Conversion, convert
from sana_sprint.checkpoints.reader import open_checkpoint

# Of each kind of damage; there are eight kinds that change bytes and three that change tensors.
NUM_INPUTS = 100
# A conversion takes some hundredths of a second.
MOST_SECONDS = 30

Tensors = dict[str, torch.Tensor]
Damage = Callable[[random.Random, bytearray], bytearray]


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError("a conversion hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def tensors(reduced) -> Tensors:
    """A small Sprint transformer in the original layout, everything that may lie beside it included."""
    whole = reduced("sprint").tensors
    return {key: tensor for key, tensor in whole.items() if not key.startswith("blocks.1.")}


def contents(path: Path) -> tuple[Tensors, str]:
    with open_checkpoint(path) as checkpoint:
        config = (path / "config.json").read_text()
        return {key: checkpoint.read(key).clone() for key in checkpoint.tensors}, config


def is_same(found: tuple[Tensors, str], wanted: tuple[Tensors, str]) -> bool:
    return (
        found[1] == wanted[1]
        and found[0].keys() == wanted[0].keys()
        and all(torch.equal(found[0][key], wanted[0][key]) for key in wanted[0])
    )


def outcome(source: Path, output: Path) -> str | None:
    """The line that a conversion is refused with, or None if it is made; what is refused leaves no output."""
    signal.alarm(MOST_SECONDS)
    line = None
    try:
        convert(Conversion(source=source, output=output))
    except (ValueError, OSError) as error:
        line = str(error)
    finally:
        signal.alarm(0)
    if line is not None:
        assert str(source) in line
        assert "\n" not in line
        assert not output.exists()
        assert not list(output.parent.glob(".*.partial"))
    return line


def flipped(draw: random.Random, data: bytearray, start: int = 0, end: int | None = None) -> bytearray:
    """The same bytes with one to eight bits of them turned over."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(start, end or len(data))] ^= 1 << draw.randrange(8)
    return data


def cut(draw: random.Random, data: bytearray) -> bytearray:
    """Without its end; sometimes almost nothing is left, sometimes almost nothing is missing."""
    length = len(data)
    return data[: draw.choice((draw.randrange(length), draw.randrange(200), length - 1 - draw.randrange(200)))]


def gapped(draw: random.Random, data: bytearray) -> bytearray:
    """With a stretch missing from the middle, or zeroed, as after a broken copy."""
    start = draw.randrange(len(data) - 1)
    end = min(start + draw.choice((1, 64, 4096)), len(data))
    data[start:end] = b"" if draw.random() < 0.5 else bytes(end - start)
    return data


def header_flipped(draw: random.Random, data: bytearray) -> bytearray:
    """With bits turned over in the length or the text of a safetensors header."""
    return flipped(draw, data, end=8 + int.from_bytes(data[:8], "little"))


def header_digit_changed(draw: random.Random, data: bytearray) -> bytearray:
    """With another digit in a safetensors header: a shape, an offset, or the number of a block."""
    length = int.from_bytes(data[:8], "little")
    places = [place for place in range(8, 8 + length) if chr(data[place]).isdigit()]
    place = draw.choice(places)
    data[place] = ord(draw.choice([digit for digit in "0123456789" if ord(digit) != data[place]]))
    return data


def spread(source: Path, damage: Damage, tmp_path: Path, wanted: tuple[Tensors, str]) -> list[str | None]:
    """What becomes of many inputs with one kind of damage. One that is converted must be what the intact one is."""
    draw, intact, outcomes = random.Random(damage.__name__), source.read_bytes(), []
    for number in range(NUM_INPUTS):
        source.write_bytes(damage(draw, bytearray(intact)))
        outcomes.append(outcome(source, tmp_path / "out"))
        if outcomes[-1] is None:
            assert is_same(contents(tmp_path / "out"), wanted), f"input {number} is converted to something else"
            shutil.rmtree(tmp_path / "out")
    return outcomes


@pytest.fixture
def wanted(tensors, tmp_path) -> tuple[Tensors, str]:
    """What the intact checkpoint is converted to."""
    (tmp_path / "intact").mkdir()
    torch.save({"state_dict": tensors}, tmp_path / "intact" / "model.pth")
    convert(Conversion(source=tmp_path / "intact" / "model.pth", output=tmp_path / "intact" / "out"))
    return contents(tmp_path / "intact" / "out")


@pytest.mark.parametrize("damage", [flipped, cut, gapped])
def test_no_damaged_pth_file_is_converted_to_anything_else(tensors, wanted, tmp_path, damage):
    torch.save({"state_dict": tensors}, tmp_path / "model.pth")
    outcomes = spread(tmp_path / "model.pth", damage, tmp_path, wanted)
    # Bits between the records mean nothing, and an archive may be read without them.
    assert sum(line is not None for line in outcomes) > 0.8 * NUM_INPUTS


@pytest.mark.parametrize("damage", [cut, header_flipped, header_digit_changed])
def test_no_safetensors_file_with_a_damaged_header_or_end_is_converted_to_anything_else(
    tensors, wanted, tmp_path, damage
):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    outcomes = spread(tmp_path / "model.safetensors", damage, tmp_path, wanted)
    assert sum(line is not None for line in outcomes) > 0.8 * NUM_INPUTS


def test_a_safetensors_file_with_damaged_numbers_is_refused_or_changes_those_numbers_alone(tensors, wanted, tmp_path):
    """The format has no checksums: what can be promised is that the damage does not spread."""
    source = tmp_path / "model.safetensors"
    save_file(tensors, source)
    intact, draw = source.read_bytes(), random.Random(0)
    for _ in range(NUM_INPUTS):
        start = 8 + int.from_bytes(intact[:8], "little")
        source.write_bytes(flipped(draw, bytearray(intact), start=start))
        if outcome(source, tmp_path / "out") is None:
            found = contents(tmp_path / "out")
            assert found[1] == wanted[1]
            changed = sum(int((found[0][key] != wanted[0][key]).sum()) for key in wanted[0])
            assert changed <= 8
            shutil.rmtree(tmp_path / "out")


def test_a_damaged_config_or_index_is_refused_or_says_something_else_of_the_same_weights(tensors, tmp_path):
    source = tmp_path / "model.pth"
    torch.save({"state_dict": tensors}, source)
    convert(Conversion(source=source, output=tmp_path / "in", shard_bytes=100_000))
    wanted, _ = contents(tmp_path / "in")
    draw = random.Random(1)
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        path = tmp_path / "in" / name
        intact = path.read_bytes()
        for _ in range(NUM_INPUTS // 2):
            path.write_bytes(draw.choice((flipped, cut, gapped))(draw, bytearray(intact)))
            if outcome(tmp_path / "in", tmp_path / "out") is None:
                found, config = contents(tmp_path / "out")
                assert json.loads(config)["_class_name"] == "SanaTransformer2DModel"
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[key], wanted[key]) for key in wanted)
                shutil.rmtree(tmp_path / "out")
        path.write_bytes(intact)


def test_an_index_that_was_altered_with_its_checksum_is_refused_or_names_the_same_tensors(tensors, wanted, tmp_path):
    """No accident does that. What a forger can make of it is other numbers, as he could without it."""
    source, draw = tmp_path / "model.pth", random.Random(2)
    torch.save({"state_dict": tensors}, source)
    with zipfile.ZipFile(source) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    (index,) = (name for name in records if name.endswith("data.pkl"))
    outcomes = []
    for _ in range(NUM_INPUTS):
        damaged = draw.choice((flipped, cut, gapped))(draw, bytearray(records[index]))
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, bytes(damaged) if name == index else data)
        outcomes.append(outcome(source, tmp_path / "out"))
        if outcomes[-1] is None:
            assert contents(tmp_path / "out")[0].keys() == wanted[0].keys()
            shutil.rmtree(tmp_path / "out")
    assert any(outcomes)


def removed(draw: random.Random, tensors: Tensors) -> Tensors:
    """Without one to five tensors, of which at least one is needed."""
    gone = {draw.choice([key for key in tensors if key not in ("pos_embed", "y_embedder.y_embedding")])}
    gone |= set(draw.sample(sorted(tensors), draw.randrange(5)))
    if {"logvar_linear.weight", "logvar_linear.bias"} <= gone:  # both may be absent
        gone.add("final_layer.linear.weight")
    return {key: tensor for key, tensor in tensors.items() if key not in gone}


def added(draw: random.Random, tensors: Tensors) -> Tensors:
    """With a tensor that no model has, under a name that looks like one."""
    key = draw.choice(sorted(tensors))
    name = draw.choice((f"{key}.1", key.replace(".", "_"), f"ema.{key}", f"{key}_scale", key.upper(), f"extra.{key}"))
    if name in tensors:
        name += "_2"
    return {**tensors, name: tensors[key].clone()}


def misshaped(draw: random.Random, tensors: Tensors) -> Tensors:
    """With one tensor cut, repeated, turned or flattened."""
    exempt = ("pos_embed", "y_embedder.y_embedding")  # of the first any shape will do, of the second any length
    key = draw.choice([key for key, tensor in tensors.items() if key not in exempt and tensor.numel() > 1])
    tensor = tensors[key]
    shapes = [
        torch.cat([tensor, tensor]),
        tensor.reshape(-1, 1, 1),
        tensor.unsqueeze(0),
        tensor[:0],
        tensor.flatten()[0],
        tensor[: max(tensor.shape[0] // 2, 1)],
    ]
    different = [one for one in shapes if one.shape != tensor.shape]
    return {**tensors, key: draw.choice(different).contiguous().clone()}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", [removed, added, misshaped])
def test_no_checkpoint_with_tensors_removed_added_or_misshaped_is_converted(tensors, tmp_path, damage, ending):
    source, draw = tmp_path / f"model{ending}", random.Random(damage.__name__)
    for number in range(NUM_INPUTS // 2):
        damaged = damage(draw, tensors)
        if ending == ".pth":
            torch.save({"state_dict": damaged}, source)
        else:
            save_file(damaged, source)
        line = outcome(source, tmp_path / "out")
        assert line is not None, f"input {number} is converted"
