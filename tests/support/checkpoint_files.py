"""Checkpoints on disk, for tests: converted, read and compared."""

from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.convert import Conversion, Report, convert
from sana_sprint.checkpoints.reader import open_checkpoint


def run(source: Path, output: Path, **options: Any) -> Report:
    return convert(Conversion(source=source, output=output, **options))


def contents(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read(key).clone() for key in checkpoint.tensors}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alter_a_number(file: Path, tensor: torch.Tensor) -> None:
    """Change one bit of a tensor where it lies in a file."""
    data = bytearray(file.read_bytes())
    data[data.find(tensor.numpy().tobytes()) + 1000] ^= 1
    file.write_bytes(data)
