"""A plan and the checkpoint it is for to files: diffusers' folders in shards, or one original file."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.entries import Entry
from sana_sprint.checkpoints.plan import Move
from sana_sprint.checkpoints.reader import ASIDE_FILE, CONFIG_FILE, WEIGHTS_NAME, Checkpoint
from sana_sprint.checkpoints.safetensors_file import write_safetensors
from sana_sprint.checkpoints.torch_file import write_torch

TORCH_ENDINGS = (".pth", ".pt", ".ckpt")
ORIGINAL_ENDINGS = (*TORCH_ENDINGS, ".safetensors")

_PIECE = 2**20

# What all published models are made of; int64 counts the batches of a batch norm.
_WRITABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)


def entries_of(moves: Sequence[Move], checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[Entry]:
    """What is to be written: each tensor in its own dtype, or floating ones in `dtype`.

    Making an entry raises ValueError if a number is not finite, or does not fit in `dtype`.

    Raises:
        ValueError: for a dtype that none of the models is made of, and no `dtype` to cast it to.
    """
    entries = []
    for move in moves:
        found = reduce(torch.promote_types, (checkpoint.tensors[source].dtype for source in move.sources))
        chosen = dtype if dtype is not None and found.is_floating_point else found
        if chosen not in _WRITABLE:
            raise ValueError(f"{checkpoint.path}: {move.sources[0]} is stored as {found}; give a dtype, such as bf16")
        make = partial(_make, move, checkpoint, chosen)
        entries.append(Entry(key=move.target, shape=move.shape, dtype=chosen, make=make))
    return entries


def _make(move: Move, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    tensor = move.apply([checkpoint.read(key) for key in move.sources])
    made = tensor.to(dtype)
    if not _is_finite(made):
        name = str(dtype).removeprefix("torch.")
        reason = f"numbers too large for {name}" if _is_finite(tensor) else "NaN or infinity, as after damage"
        raise ValueError(f"{checkpoint.path}: {move.sources[0]} holds {reason}")
    return made


def _is_finite(tensor: torch.Tensor) -> bool:
    # In pieces: the test takes more memory than what is tested.
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(_PIECE))


def in_shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """The entries in order, in groups of at most `shard_bytes`; one that is larger has a group of its own."""
    shards: list[list[Entry]] = []
    room = -1
    for entry in entries:
        if entry.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    entries: Sequence[Entry],
    aside: Sequence[Entry],
    *,
    shard_bytes: int,
    advance: Callable[[int], object],
) -> None:
    """Writes a folder as `save_pretrained` does, and the tensors that have no place in the model beside it.

    Args:
        folder: to be made.
        config: entries of config.json, `_class_name` among them.
        entries: the model's tensors.
        aside: tensors for `ASIDE_FILE`, which is not written if there are none.
        shard_bytes: the most that a file of weights may hold.
        advance: told how many bytes were written.
    """
    folder.mkdir()
    write_json(folder / CONFIG_FILE, config)
    shards = in_shards(entries, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / f"{WEIGHTS_NAME}.safetensors", entries, advance)
    else:
        _write_shards(folder, shards, advance)
    if aside:
        write_safetensors(folder / ASIDE_FILE, aside, advance)


def _write_shards(folder: Path, shards: Sequence[Sequence[Entry]], advance: Callable[[int], object]) -> None:
    homes = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{WEIGHTS_NAME}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, advance)
        homes.update({entry.key: name for entry in shard})
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    write_json(folder / f"{WEIGHTS_NAME}.safetensors.index.json", index)


def write_original(path: Path, entries: Sequence[Entry], advance: Callable[[int], object]) -> None:
    """Writes one file: as torch.save does, under "state_dict", or in the safetensors format, by the path's ending."""
    write = write_torch if path.suffix in TORCH_ENDINGS else write_safetensors
    write(path, entries, advance)


def model_config(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as diffusers saves it: with the class it is for, and the version of diffusers."""
    return {**config, "_class_name": class_name, "_diffusers_version": version("diffusers")}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as diffusers does: indented, names in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
