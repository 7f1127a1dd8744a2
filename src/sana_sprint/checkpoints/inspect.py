"""A checkpoint to a description: what it is, how large, and every tensor that is missing, unexpected or mis-shaped."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sana_sprint.checkpoints.evidence import Ambiguity
from sana_sprint.checkpoints.plan import Plan, plan_conversion
from sana_sprint.checkpoints.reader import Checkpoint, component_folders, open_checkpoint
from sana_sprint.checkpoints.recognise import Family, recognise
from sana_sprint.checkpoints.rules import Kind, Layout

CLASSES = {
    "transformer": "SanaTransformer2DModel",
    "autoencoder": "AutoencoderDC",
    "controlnet": "SanaControlNetModel",
}
_LAYER_COUNTS = ("num_layers", "encoder_layers_per_block", "decoder_layers_per_block")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# How many names an error of one line gives.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is. Names are those in the file, prefix included.

    Attributes:
        path: where it lies.
        name: for people.
        kind, layout, prefix, config: as in `Family`.
        num_tensors: of everything in the file.
        num_parameters: of the model, once complete; statistics of norms are not counted.
        num_bytes: of everything in the file, as it is stored.
        dtypes: how many numbers of each dtype there are.
        aside: tensors kept beside a model in diffusers' layout.
        dropped: tensors that a conversion leaves out, because they can be recomputed.
        elsewhere: tensors of another model in the same file.
        missing, unexpected: what keeps it from being converted.
        misshaped: the same: (name, shape found, shape wanted).
        doubts: settings that the tensors cannot tell, and what was assumed.
    """

    path: Path
    name: str
    kind: Kind
    layout: Layout
    prefix: str
    config: Mapping[str, Any]
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: Mapping[str, int]
    aside: tuple[str, ...]
    dropped: tuple[str, ...]
    elsewhere: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    doubts: tuple[Ambiguity, ...]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is missing, unexpected or mis-shaped."""
        return not (self.missing or self.unexpected or self.misshaped)

    def as_document(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "path": str(self.path), "is_exact": self.is_exact}


def identify(checkpoint: Checkpoint, settings: Mapping[str, Any], kind: Kind | None = None) -> Family:
    """What an opened checkpoint is: by its tensors, the config.json beside it, and `settings`, which win.

    Raises:
        ValueError: in one line, naming the checkpoint, if it is no model of ours or contradicts its config.
    """
    config = checkpoint.config or {}
    own = config if config.get("_class_name") in CLASSES.values() else {}
    known = {**own, **settings}
    try:
        _refuse_endless(known, len(checkpoint.tensors))
        return recognise(checkpoint.tensors, file_name=str(checkpoint.path), settings=known, kind=kind)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    except (TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{checkpoint.path}: a setting is of another kind than wanted ({error})") from None


def _refuse_endless(settings: Mapping[str, Any], num_tensors: int) -> None:
    """A damaged config.json must not ask for a model that takes forever to lay out."""
    for name in _LAYER_COUNTS:
        counts = settings.get(name, 0)
        counts = counts if isinstance(counts, (list, tuple)) else [counts]
        if not all(isinstance(count, int) and 0 <= count <= num_tensors for count in counts):
            raise ValueError(f"{name} is {settings[name]!r}, for {num_tensors} tensors")


def plan_for(checkpoint: Checkpoint, family: Family, to: Layout) -> Plan:
    """The plan of a conversion. Raises ValueError, naming the checkpoint, for a config that makes no model."""
    try:
        return plan_conversion(family, checkpoint.tensors, to)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def refuse_inexact(checkpoint: Checkpoint, family: Family, plan: Plan) -> None:
    """Raises ValueError, in one line, if anything is missing, unexpected or mis-shaped."""
    faults = []
    if plan.missing:
        faults.append(f"{len(plan.missing)} tensors are missing ({_some(plan.missing)})")
    if plan.misshaped:
        shapes = [
            f"{name} {readable_shape(found)}, not {readable_shape(wanted)}" for name, found, wanted in plan.misshaped
        ]
        faults.append(f"{len(plan.misshaped)} are of another shape ({_some(shapes)})")
    if plan.unexpected:
        faults.append(f"{len(plan.unexpected)} are unexpected ({_some(plan.unexpected)})")
    if faults:
        raise ValueError(f"{checkpoint.path} is no whole {family.name}: {'; '.join(faults)}")


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", .." if len(names) > _NAMED else "")


def readable_shape(shape: tuple[int, ...]) -> str:
    """A shape as people write it: 64x4x1x1."""
    return "x".join("any" if size < 0 else str(size) for size in shape) or "a number"


def inspect_checkpoint(
    path: str | os.PathLike, *, ema: bool = False, settings: Mapping[str, Any] | None = None
) -> tuple[Inspection, ...]:
    """What lies at `path`: one model, or each that a pipeline's folder holds. Reads no weights.

    Args:
        path: a file, the index of several, or a folder.
        ema: the averaged weights of a training snapshot.
        settings: entries of the config that are known, and that tensors cannot tell; of a pipeline, those of the
            components that have them.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: in one line, for anything that is no checkpoint of SANA, its ControlNet or DC-AE, and for a setting
            that nothing there has.
    """
    place, given = Path(path).expanduser(), dict(settings or {})
    components: Sequence[str | None] = component_folders(place) if place.is_dir() else ()
    if not components:
        with open_checkpoint(place, ema=ema) as checkpoint:
            return (describe(checkpoint, identify(checkpoint, given)),)
    inspections, nobodys = [], set(given)
    for component in components:
        with open_checkpoint(place, ema=ema, component=component) as checkpoint:
            own = {name: given[name] for name in given.keys() & identify(checkpoint, {}).config.keys()}
            inspections.append(describe(checkpoint, identify(checkpoint, own)))
            nobodys -= own.keys()
    if nobodys:
        raise ValueError(f"{place} holds nothing with such a setting: {', '.join(sorted(nobodys))}")
    return tuple(inspections)


def describe(checkpoint: Checkpoint, family: Family) -> Inspection:
    """The description of an opened checkpoint."""
    plan = plan_for(checkpoint, family, "diffusers")
    dtypes: Counter[str] = Counter()
    num_bytes = 0
    for info in checkpoint.tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
        num_bytes += math.prod(info.shape) * info.dtype.itemsize
    return Inspection(
        path=checkpoint.path,
        name=family.name,
        kind=family.kind,
        layout=family.layout,
        prefix=family.prefix,
        config=family.config,
        num_tensors=len(checkpoint.tensors),
        num_parameters=sum(math.prod(move.shape) for move in plan.moves if not move.target.endswith(_STATISTICS)),
        num_bytes=num_bytes,
        dtypes=dict(dtypes.most_common()),
        aside=tuple(move.target for move in plan.aside),
        dropped=plan.dropped,
        elsewhere=plan.elsewhere,
        missing=plan.missing,
        unexpected=plan.unexpected,
        misshaped=plan.misshaped,
        doubts=family.ambiguous,
    )
