"""What a checkpoint is, and the layout wanted, to a list of moves: which tensor of the result is made of which."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.recognise import Family
from sana_sprint.checkpoints.rules import ANY_SIZE, COMPANIONS, Kind, Layout, Place, Table, TensorInfo, table_of
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

__all__ = ["Move", "Plan", "TensorInfo", "plan_conversion"]

Shape = tuple[int, ...]

MODELS: dict[Kind, Callable[..., torch.nn.Module]] = {
    "transformer": SanaTransformer2DModel,
    "controlnet": SanaControlNetModel,
    "autoencoder": AutoencoderDC,
}


@dataclass(frozen=True)
class Move:
    """How one tensor of the result is made.

    Attributes:
        target: its name.
        sources: one tensor of the input, or several to be joined along dim 0.
        shape: of the result.
        part: (index, count): the result is this one of `count` equal parts of the source, along dim 0.
    """

    target: str
    sources: tuple[str, ...]
    shape: Shape
    part: tuple[int, int] | None = None

    def apply(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result, of the tensors that `sources` names; a view of a single one."""
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.part is not None:
            index, count = self.part
            rows = tensor.shape[0] // count
            tensor = tensor[index * rows : (index + 1) * rows]
        return tensor.reshape(self.shape)


@dataclass(frozen=True)
class Plan:
    """A conversion, and what stands in its way. Names are the input's, prefix included, but for targets.

    Attributes:
        moves: of the model itself, in the target's order. To the original layout, which is one file, also of what
            was kept aside.
        aside: tensors to be kept beside the model, under their original names.
        dropped: known and recomputable.
        missing: wanted by the target, not in the input.
        unexpected: in the input, known to no rule.
        misshaped: (name, shape found, shape wanted).
        elsewhere: known, but of another model in the same file: what a ControlNet's file holds of its frozen base.
    """

    moves: tuple[Move, ...]
    aside: tuple[Move, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, Shape, Shape], ...]
    elsewhere: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether nothing is missing, unexpected or mis-shaped."""
        return not (self.missing or self.unexpected or self.misshaped)


def _model_shapes(family: Family) -> dict[str, Shape]:
    """Names and shapes of the model in diffusers' layout, from our classes without their memory."""
    model = MODELS[family.kind]
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in model(**family.config).state_dict().items()}
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"there is no {family.kind} of the sizes that the checkpoint shows: {reason}") from error


def _place(table: Table, name: str) -> Place:
    place = table.original_of(name)
    if place is None:
        raise ValueError(f"the original layout has no name for {name}: no published model has this tensor")
    return place


def _aside_shapes(family: Family, table: Table, present: Container[str]) -> dict[str, Shape]:
    """What belongs beside the model, by groups of which something is `present`."""
    sizes: dict[str, int] = {}
    if table.aside:
        width = family.config["num_attention_heads"] * family.config["attention_head_dim"]
        sizes = {"width": width, "caption_channels": family.config["caption_channels"]}
    shapes: dict[str, Shape] = {}
    for group in table.aside:
        if any(name in present for name in group):
            for name, shape in group.items():
                shapes[name] = tuple(sizes[size] if isinstance(size, str) else size for size in shape)
    return shapes


def _fits(found: Shape, wanted: Shape) -> bool:
    if len(found) != len(wanted):
        return False
    return all(a == b or (b == ANY_SIZE and a > 0) for a, b in zip(found, wanted, strict=True))


def _originals(places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> dict[str, tuple[tuple[str, ...], Shape]]:
    """Tensors of the original layout: the diffusers names of their parts, in order, and their shape."""
    parts: dict[str, dict[int, str]] = {}
    for name, place in places.items():
        parts.setdefault(place.name, {})[place.part] = name
    originals = {}
    for original, by_part in parts.items():
        names = tuple(by_part[part] for part in sorted(by_part))
        place, shape = places[names[0]], shapes[names[0]]
        if place.count > 1:
            shape = (sum(shapes[name][0] for name in names), *shape[1:])
        originals[original] = (names, (*shape, 1, 1) if place.pointwise else shape)
    return originals


def plan_conversion(family: Family, tensors: Mapping[str, TensorInfo], to: Layout) -> Plan:
    """How the checkpoint `tensors`, recognised as `family`, becomes one in layout `to`.

    `to` may be the layout that it has: the plan then copies, and says what is missing, unexpected or mis-shaped.

    Raises:
        ValueError: if no model has this config, or the original layout has no name for one of its tensors.
    """
    prefix = family.prefix
    found = {name[len(prefix) :]: info.shape for name, info in tensors.items() if name.startswith(prefix)}
    table = table_of(family.kind, family.config)
    shapes = _model_shapes(family)
    places = {name: _place(table, name) for name in shapes}
    originals = _originals(places, shapes)

    source = shapes if family.layout == "diffusers" else {name: shape for name, (_, shape) in originals.items()}
    aside = _aside_shapes(family, table, found)
    dropped = [name for name in found if name not in source and table.is_dropped(name)]
    known = {*source, *aside, *dropped}
    companion = COMPANIONS.get(family.kind) if family.layout == "original" else None
    # What both tables name is this model's: unwanted, it is unexpected, and not the other one's.
    own = table.names("original")
    elsewhere = [
        name
        for name in found
        if companion and name not in known and companion.names("original").fullmatch(name) and not own.fullmatch(name)
    ]
    known.update(elsewhere)

    if to == family.layout:
        moves = [Move(name, (prefix + name,), shape) for name, shape in source.items()]
    elif to == "diffusers":
        moves = [
            Move(name, (prefix + place.name,), shapes[name], (place.part, place.count) if place.count > 1 else None)
            for name, place in places.items()
        ]
    else:
        moves = [
            Move(name, tuple(prefix + part for part in parts), shape) for name, (parts, shape) in originals.items()
        ]
    kept = [Move(name, (prefix + name,), found[name]) for name in aside if name in found]
    expected = {**source, **aside}
    return Plan(
        moves=tuple([*moves, *kept] if to == "original" else moves),
        aside=() if to == "original" else tuple(kept),
        dropped=tuple(prefix + name for name in dropped),
        missing=tuple(prefix + name for name in expected if name not in found),
        unexpected=tuple(name for name in tensors if not name.startswith(prefix) or name[len(prefix) :] not in known),
        misshaped=tuple(
            (prefix + name, found[name], wanted)
            for name, wanted in expected.items()
            if name in found and not _fits(found[name], wanted)
        ),
        elsewhere=tuple(prefix + name for name in elsewhere),
    )
