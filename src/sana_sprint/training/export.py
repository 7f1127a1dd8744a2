"""A trained transformer to a checkpoint in diffusers' layout: a whole pipeline where it came from one."""

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from sana_sprint.checkpoints.assembly import SchedulerName, write_pipeline_index, write_scheduler
from sana_sprint.checkpoints.reader import CONFIG_FILE, PIPELINE_FILE, read_json
from sana_sprint.checkpoints.staging import staged
from sana_sprint.checkpoints.writer import write_json
from sana_sprint.transformer.model import SanaTransformer2DModel

# How a checkpoint was made, in its folder.
RECORD = "training.json"

_ENCODERS = ("text_encoder", "tokenizer", "vae")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write how a checkpoint was made into its folder; entries keep their order, and paths become texts."""
    (folder / RECORD).write_text(_readable_json(record) + "\n", encoding="utf-8")


def save_network(network: Any, folder: Path) -> None:
    """Write a network of diffusers, without where it was loaded from, which is of this machine alone."""
    network.save_pretrained(folder)
    config = folder / CONFIG_FILE
    content = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, {name: value for name, value in content.items() if name != "_name_or_path"})


def record_of(recipe: Any, logs: dict[str, Path], device: torch.device) -> dict[str, Any]:
    """The settings, versions and losses that made a checkpoint.

    Args:
        recipe: a dataclass.
        logs: of the stages, by name.
        device: what was trained on.
    """
    return {
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(device),
        },
        "losses": {stage: _thinned(path) for stage, path in logs.items()},
    }


def _thinned(log: Path, most: int = 60) -> dict[str, list[Any]]:
    """At most `most` entries of a log, evenly apart, the last one among them: by name, a column of each value."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stride = max(1, -(-len(entries) // most))
    kept = entries[::-1][::stride][::-1]
    names = dict.fromkeys(name for entry in kept for name in entry)
    return {name: [entry.get(name) for entry in kept] for name in names}


def _readable_json(value: Any, depth: int = 0) -> str:
    """A line for each entry of an object, and lists on one line; what JSON does not know becomes a text."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, default=str)
    indent = "  " * depth
    lines = [f"{indent}  {json.dumps(str(name))}: {_readable_json(each, depth + 1)}" for name, each in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def export_network(output: Path, network: Any, record: dict[str, Any]) -> None:
    """Write a network of diffusers alone, otherwise as `export` does."""
    network.to(torch.bfloat16)
    with staged(output, force=True) as folder:
        save_network(network, folder)
        write_record(folder, record)


def export(
    output: Path,
    transformer: SanaTransformer2DModel,
    scheduler: SchedulerName,
    pipeline: Path | None,
    record: dict[str, Any],
    flow_shift: float | None = None,
) -> None:
    """Write a transformer, in bfloat16, to a folder that is there whole or not at all; an earlier one is replaced.

    Args:
        output: the folder.
        transformer: what was trained; it is cast in place.
        scheduler: what the pipeline steps with.
        pipeline: a folder whose text encoder, tokenizer and autoencoder are copied, for a whole pipeline; None for the
            transformer alone.
        record: how it was made, for a file beside it.
        flow_shift: of a flow-matching scheduler.

    Raises:
        ValueError: if `output` is a folder of something else.
        OSError: if there is no room.
    """
    if pipeline is None:
        export_network(output, transformer, record)
        return
    transformer.to(torch.bfloat16)
    with staged(output, force=True) as folder:
        save_network(transformer, folder / "transformer")
        name = write_scheduler(folder / "scheduler", scheduler, flow_shift)
        entries = read_json(pipeline / PIPELINE_FILE)
        for encoder in _ENCODERS:
            shutil.copytree(pipeline / encoder, folder / encoder)
        classes = {
            "scheduler": ["diffusers", name],
            "transformer": ["diffusers", SanaTransformer2DModel.__name__],
            **{encoder: entries[encoder] for encoder in _ENCODERS},
        }
        write_pipeline_index(folder, scheduler, classes)
        write_record(folder, record)
