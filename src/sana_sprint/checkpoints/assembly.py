"""A scheduler's name and a Gemma-2 folder to what a pipeline's folder holds beside transformer and autoencoder."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from sana_sprint.checkpoints.reader import CONFIG_FILE, PIPELINE_FILE, open_checkpoint, read_json
from sana_sprint.checkpoints.recognise import Family
from sana_sprint.checkpoints.writer import write_json

SchedulerName = Literal["scm", "flow-dpm_solver", "flow-euler"]

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_COPY_BYTES = 2**24
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """The files of a Gemma-2 and its tokenizer, checked to be there."""

    model_files: tuple[Path, ...]
    tokenizer_files: tuple[Path, ...]
    tokenizer_class: str

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in (*self.model_files, *self.tokenizer_files))

    def copy(self, pipeline: Path, advance: Callable[[int], object]) -> None:
        """Copies both to their folders in that of a pipeline."""
        for name, files in (("text_encoder", self.model_files), ("tokenizer", self.tokenizer_files)):
            (pipeline / name).mkdir()
            for file in files:
                _copy(file, pipeline / name / file.name, advance)


def _copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        while chunk := read.read(_COPY_BYTES):
            write.write(chunk)
            advance(len(chunk))


def _weights_of(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files of a Gemma-2's weights, an index included. Raises ValueError if they are damaged or not all there."""
    with open_checkpoint(folder) as checkpoint:
        names, files = list(checkpoint.tensors), checkpoint.paths
    if any(file.suffix != ".safetensors" for file in files):
        raise ValueError(f"{folder} holds no weights in safetensors format")
    layers = {int(found[1]) for name in names if (found := _LAYER.match(name))}
    if len(layers) != config.get("num_hidden_layers"):
        raise ValueError(
            f"the text encoder in {folder} has {config.get('num_hidden_layers')} layers, its weights have {len(layers)}"
        )
    return sorted([*files, *folder.glob("*.safetensors.index.json")])


def find_text_encoder(folder: Path, caption_channels: int) -> TextEncoder:
    """The text encoder in a folder: Gemma-2 with its tokenizer, or a pipeline that has them.

    Args:
        folder: that of the model, or of a pipeline.
        caption_channels: the width of features that the transformer reads.

    Raises:
        ValueError: if there is no whole Gemma-2 of that width in safetensors format, or no tokenizer.
    """
    folder = folder.expanduser()
    is_pipeline = (folder / "text_encoder").is_dir()
    model, tokenizer = (folder / "text_encoder", folder / "tokenizer") if is_pipeline else (folder, folder)
    if not (model / CONFIG_FILE).is_file():
        raise ValueError(f"{model} is no folder of a text encoder: it holds no {CONFIG_FILE}")
    config = read_json(model / CONFIG_FILE)
    if config.get("model_type") != "gemma2":
        raise ValueError(f"the text encoder must be a Gemma-2, {model} holds {config.get('model_type')}")
    if config.get("hidden_size") != caption_channels:
        raise ValueError(
            f"the transformer reads captions of width {caption_channels}, the text encoder in {model} gives"
            f" {config.get('hidden_size')}"
        )
    weights = _weights_of(model, config)
    words = tuple(tokenizer / name for name in _TOKENIZER_FILES if (tokenizer / name).is_file())
    if not {"tokenizer.json", "tokenizer.model"} & {file.name for file in words}:
        raise ValueError(f"{tokenizer} holds no tokenizer: neither tokenizer.json nor tokenizer.model")
    settings = read_json(tokenizer / _TOKENIZER_CONFIG) if (tokenizer / _TOKENIZER_CONFIG).is_file() else {}
    return TextEncoder(
        model_files=(model / CONFIG_FILE, *weights),
        tokenizer_files=words,
        tokenizer_class=settings.get("tokenizer_class", "GemmaTokenizer"),
    )


def choose_scheduler(family: Family, asked: SchedulerName | None) -> SchedulerName:
    """The scheduler of a transformer's pipeline; DPM-Solver, as NVlabs samples them, for flow models by default.

    Raises:
        ValueError: if `asked` is none that the pipeline of this model works with.
    """
    if family.scheduler == "scm":
        if asked not in (None, "scm"):
            raise ValueError(f"a {family.name} is sampled with scm, its pipeline has no use for {asked}")
        return "scm"
    if asked == "scm":
        raise ValueError(f"scm is for SANA-Sprint; this is a {family.name}, sampled with flow-dpm_solver or flow-euler")
    return asked or "flow-dpm_solver"


def write_scheduler(folder: Path, name: SchedulerName, flow_shift: float | None) -> str:
    """Writes the scheduler's config; returns its class name. `flow_shift` is for flow models: how late noise goes."""
    scheduler: Any
    if name == "scm":
        from sana_sprint.trigflow.scheduler import SCMScheduler

        scheduler = SCMScheduler()
    elif name == "flow-euler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    else:
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            flow_shift=flow_shift, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    scheduler.save_config(folder)
    return type(scheduler).__name__


def write_pipeline_index(folder: Path, scheduler: SchedulerName, classes: Mapping[str, Sequence[str]]) -> None:
    """Writes model_index.json: the pipeline, which its scheduler tells, and (library, class) of each component."""
    index = {
        "_class_name": "SanaSprintPipeline" if scheduler == "scm" else "SanaPipeline",
        "_diffusers_version": version("diffusers"),
        **{name: list(home) for name, home in classes.items()},
    }
    write_json(folder / PIPELINE_FILE, index)
