"""Names, shapes and dtypes of a checkpoint's tensors to what it is: kind, layout and config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import torch

from sana_sprint.checkpoints.autoencoder_config import autoencoder_config, autoencoder_name
from sana_sprint.checkpoints.evidence import Ambiguity, Shapes
from sana_sprint.checkpoints.rules import (
    AUTOENCODER_SHUFFLED,
    AUTOENCODER_STRIDED,
    CONTROLNET,
    LAYOUTS,
    TRANSFORMER,
    Kind,
    Layout,
    Table,
    TensorInfo,
)
from sana_sprint.checkpoints.transformer_config import controlnet_config, transformer_config, transformer_name

# What training wrappers and other programs put in front of every name. The empty one is first, so that it wins a draw.
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "module.",
    "base_model.",
    "transformer.",
    "first_stage_model.",
    "vae.",
)
# A transformer's file has as much in common with a ControlNet's as with itself, and wins the draw by coming first.
TABLES: tuple[tuple[Kind, Table], ...] = (
    ("transformer", TRANSFORMER),
    ("controlnet", CONTROLNET),
    ("autoencoder", AUTOENCODER_STRIDED),
    ("autoencoder", AUTOENCODER_SHUFFLED),
)
# What no other published model has: the mix-FFN inside a block, and stages of our blocks.
HALLMARKS = {
    "transformer": re.compile(r"blocks\.\d+\.(mlp\.depth_conv|ff\.conv_depth)\."),
    "controlnet": re.compile(r"(controlnet|transformer_blocks)\.\d+\.(copied_block\.mlp\.depth_conv|ff\.conv_depth)\."),
    "autoencoder": re.compile(r"(stages|down_blocks|up_blocks)\.\d+\."),
}
HUB_SNAPSHOT = re.compile(r"/snapshots/[0-9a-f]{40}\b")
FLOW_SHIFT, FLOW_SHIFT_4K = 3.0, 6.0


@dataclass(frozen=True)
class Family:
    """What a checkpoint is.

    Attributes:
        kind: which of our models it holds.
        layout: whose names its tensors bear.
        name: for people.
        config: constructor arguments of SanaTransformer2DModel, AutoencoderDC or SanaControlNetModel.
        scheduler: what a transformer is sampled with: "scm" (Sprint) or "flow"; None for other kinds.
        prefix: what every name in the file begins with.
        ambiguous: settings that names and shapes cannot tell.
        flow_shift: of a "flow" scheduler.
    """

    kind: Kind
    layout: Layout
    name: str
    config: dict[str, Any]
    scheduler: Literal["scm", "flow"] | None
    prefix: str = ""
    ambiguous: tuple[Ambiguity, ...] = ()
    flow_shift: float | None = None


@dataclass(frozen=True)
class _Reading:
    """One way to understand a file: which of its names it knows, prefix included."""

    kind: Kind
    layout: Layout
    prefix: str
    table: Table
    known: frozenset[str]  # of the model itself
    explained: frozenset[str]  # and of the model it stands beside

    def __str__(self) -> str:
        under = f' under "{self.prefix}"' if self.prefix else ""
        return f"{self.kind} in the {self.layout} layout{under}"


def _readings(tensors: Mapping[str, TensorInfo]) -> list[_Reading]:
    readings = []
    for prefix in PREFIXES:
        names = {name: name[len(prefix) :] for name in tensors if name.startswith(prefix)}
        if not names:
            continue
        for kind, table in TABLES:
            for layout in LAYOUTS:
                known = frozenset(n for n, body in names.items() if table.names(layout).fullmatch(body))
                explained = known
                if kind == "controlnet" and layout == "original":
                    base = TRANSFORMER.names(layout)
                    explained |= {name for name, body in names.items() if base.fullmatch(body)}
                readings.append(_Reading(kind, layout, prefix, table, known, explained))
    return readings


def _only_reading(tensors: Mapping[str, TensorInfo]) -> _Reading:
    """The way to understand the file, if there is one and only one."""
    readings = _readings(tensors)
    best = max(readings, key=lambda reading: len(reading.explained))
    for other in readings:
        foreign = sorted(other.known - best.explained)
        if foreign and (other.kind, other.layout, other.prefix) != (best.kind, best.layout, best.prefix):
            raise ValueError(
                f"the checkpoint is a mixture of models: {best} ({len(best.explained)} tensors), and {other}"
                f" ({len(foreign)} tensors, {foreign[0]})"
            )
    if not any(HALLMARKS[best.kind].search(name) for name in best.known) or 2 * len(best.explained) < len(tensors):
        some = [*sorted(tensors.keys() - best.explained), *sorted(best.explained)][:3]
        raise ValueError(
            f"not a checkpoint of SANA, its ControlNet or DC-AE: {len(best.explained)} of {len(tensors)} tensors bear"
            f" names of theirs; it holds {', '.join(some)}"
        )
    return best


def _check_dtypes(tensors: Mapping[str, TensorInfo], names: frozenset[str]) -> None:
    examples: dict[torch.dtype, str] = {}
    for name in sorted(names):
        dtype = tensors[name].dtype
        if name.endswith("num_batches_tracked"):
            continue
        if not dtype.is_floating_point:
            raise ValueError(f"weights must be floating-point numbers to be converted, {name} is {dtype}: quantised?")
        examples.setdefault(dtype, name)
    if torch.float16 in examples and torch.bfloat16 in examples:
        raise ValueError(
            f"weights cannot be both float16 ({examples[torch.float16]}) and bfloat16 ({examples[torch.bfloat16]}):"
            " the checkpoint is damaged"
        )


def _shapes(tensors: Mapping[str, TensorInfo], reading: _Reading) -> tuple[Shapes, Shapes]:
    """Of the model's tensors under diffusers' names, and of all others under their own, without the prefix."""
    cut = {name: info.shape for name, info in tensors.items() if name.startswith(reading.prefix)}
    model, extras = {}, {}
    for name, shape in cut.items():
        body = name[len(reading.prefix) :]
        if name not in reading.known:
            extras[body] = shape
        elif reading.layout == "diffusers":
            model[body] = shape
        else:
            parts = reading.table.diffusers_of(body)
            for part in parts:
                model[part] = (shape[0] // len(parts), *shape[1:]) if shape else shape
    return model, extras


def recognise(
    tensors: Mapping[str, TensorInfo],
    *,
    file_name: str = "",
    settings: Mapping[str, Any] | None = None,
    kind: Kind | None = None,
) -> Family:
    """What the checkpoint with these tensors is.

    Args:
        tensors: names, shapes and dtypes of everything in the file.
        file_name: for what tensors cannot tell ("…_teacher", "…_4Kpx", "…-in-1.0"); its last three parts are read,
            without those that the hub's cache puts between a repository's name and a file's.
        settings: entries of the config that are known already, from the user or a config.json (whose entries that
            begin with an underscore are passed over). They win, and are not ambiguous.
        kind: what the caller wants; "transformer" finds the frozen base in a ControlNet's original file.

    Raises:
        ValueError: in one line, for a file that is empty, holds no model of ours, more than one, another than wanted,
            or weights that are no plain floating-point numbers, and for settings that the model does not have.
    """
    if not tensors:
        raise ValueError("the checkpoint is empty: it holds no tensors")
    reading = _only_reading(tensors)
    if kind == "transformer" and reading.kind == "controlnet" and reading.layout == "original":
        base = (r for r in _readings(tensors) if (r.kind, r.layout, r.prefix) == (kind, "original", reading.prefix))
        reading = next(base)
    if kind not in (None, reading.kind):
        raise ValueError(f"the file holds no {kind} but one {reading}")
    _check_dtypes(tensors, reading.known)

    given = {name: value for name, value in (settings or {}).items() if not name.startswith("_")}
    shapes, extras = _shapes(tensors, reading)
    hint = "/".join(PurePath(HUB_SNAPSHOT.sub("", file_name)).parts[-3:])
    scheduler: Literal["scm", "flow"] | None = None
    flow_shift = None
    if reading.kind == "autoencoder":
        config, doubts = autoencoder_config(shapes, hint, given)
        name = autoencoder_name(config)
    elif reading.kind == "controlnet":
        config, doubts = controlnet_config(shapes, extras, hint, given)
        name = transformer_name(config, is_control=True)
    else:
        config, doubts = transformer_config(shapes, extras, hint, given)
        name = transformer_name(config)
        scheduler = "scm" if config["guidance_embeds"] else "flow"
        if scheduler == "flow":
            flow_shift = FLOW_SHIFT_4K if config["sample_size"] == 128 else FLOW_SHIFT
    return Family(
        kind=reading.kind,
        layout=reading.layout,
        name=name,
        config=config,
        scheduler=scheduler,
        prefix=reading.prefix,
        ambiguous=tuple(doubts),
        flow_shift=flow_shift,
    )
