"""Both published sizes of Sprint, with synthetic weights: there and back, in as little memory as promised."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sana_sprint.checkpoints.entries import Entry
from sana_sprint.checkpoints.reader import open_checkpoint
from sana_sprint.checkpoints.writer import write_original

SOURCE = Path(__file__).parents[2] / "src"
PERIOD = 2**24 - 3  # of the synthetic weights; odd, so that no two tensors are equal
SHARD_BYTES = 500 * 10**6
# Promised: 1.3 times the largest shard and 300 MB.
MOST_BYTES = 1.3 * SHARD_BYTES + 300e6

PROGRAM = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
start = time.monotonic()
from sana_sprint.checkpoints.convert import Conversion, convert
convert(Conversion(**{**json.loads(sys.argv[4]), "source": Path(sys.argv[2]), "output": Path(sys.argv[3])}))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"seconds": time.monotonic() - start, "bytes": 1024 * int(peak.split()[1])}))
"""


@pytest.fixture
def full_size(published, tmp_path) -> Callable[[str], Path]:
    """Write a file of a published size, in bfloat16, without ever holding it in memory."""

    def write(name: str) -> Path:
        shapes = {key: shape for key, shape in published(name).items() if key != "pos_embed"}
        noise = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).bfloat16()

        def make(shape: tuple[int, ...], start: int) -> torch.Tensor:
            count = torch.Size(shape).numel()
            repeats = (start + count) // PERIOD + 1
            return noise.repeat(repeats)[start : start + count].reshape(shape)

        entries = [
            Entry(
                key=key,
                shape=shape,
                dtype=torch.bfloat16,
                make=lambda shape=shape, start=7919 * number: make(shape, start % PERIOD),
            )
            for number, (key, shape) in enumerate(shapes.items())
        ]
        path = tmp_path / f"{name}_1024px.pth"
        write_original(path, entries, lambda num_bytes: None)
        return path

    return write


def convert_elsewhere(source: Path, output: Path, **options: object) -> dict[str, float]:
    """Converts in a fresh process; how long it took, imports included, and the most memory it held."""
    command = [sys.executable, "-c", PROGRAM, SOURCE, source, output, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sprint-0.6b", "sprint-1.6b"])
def test_a_full_size_checkpoint_goes_there_and_back_bit_for_bit_in_little_memory(full_size, tmp_path, name):
    source = full_size(name)
    there = convert_elsewhere(source, tmp_path / "folder", shard_bytes=SHARD_BYTES)
    back = convert_elsewhere(tmp_path / "folder", tmp_path / "back.pth", to="original")
    for measured in (there, back):
        assert measured["bytes"] <= MOST_BYTES
    with open_checkpoint(source) as wanted, open_checkpoint(tmp_path / "back.pth") as found:
        assert found.tensors == wanted.tensors
        assert all(torch.equal(found.read(key), wanted.read(key)) for key in wanted.tensors)
    for path in (*(tmp_path / "folder").iterdir(), source, tmp_path / "back.pth"):  # gigabytes, which pytest would keep
        path.unlink()
