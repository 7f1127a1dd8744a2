"""What is said (`Request`) and what is drawn (`Scene`): draws the first, and completes it to the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from sana_sprint.shapes.palette import GROUND_COLOURS, SHAPE_COLOURS

KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = tuple(SHAPE_COLOURS)
GROUNDS = tuple(GROUND_COLOURS)
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")

# Ranges of the radius, as fractions of the picture's side; a radius halfway between them tells the sizes apart.
SIZES: dict[str, tuple[float, float]] = {"small": (0.10, 0.12), "large": (0.17, 0.195)}
SIZE_BOUNDARY = (SIZES["small"][1] + SIZES["large"][0]) / 2

GAP = 0.03  # least space between two shapes
MARGIN = 0.025  # least space between a shape and the edge of the picture
# Where a relation is said, the offset across its axis is at most this share of the offset along it.
RELATION_SLOPE = 0.5

_LAYOUTS_AT_ONCE = 192  # of three large shapes one layout in 300 fits, of fewer many more
_SAY_GROUND = 0.35
_SAY_SIZE = 0.3

T = TypeVar("T")


def _check(name: str, value: object, wanted: Sequence[object]) -> None:
    if value not in wanted:
        raise ValueError(f"{name} must be one of {', '.join(map(str, wanted))}, got {value!r}")


@dataclass(frozen=True)
class Thing:
    """One noun of a request: `count` shapes of one kind; a colour or size of None is left open."""

    kind: str
    colour: str | None = None
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _check("kind", self.kind, KINDS)
        _check("colour", self.colour, (None, *COLOURS))
        _check("size", self.size, (None, *SIZES))
        _check("count", self.count, (1, 2, 3))


@dataclass(frozen=True)
class Request:
    """What a caption says: one or two things; `relation` is that of the first to the second; None is left open."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None
    ground: str | None = None

    def __post_init__(self) -> None:
        _check("category", self.category, CATEGORIES)
        _check("relation", self.relation, (None, *RELATIONS) if len(self.things) == 2 else (None,))
        _check("ground", self.ground, (None, *GROUNDS))
        counts = [thing.count for thing in self.things]
        if len(counts) != 1 and counts != [1, 1]:
            raise ValueError(f"a request wants one thing (up to three of it) or two (one of each), got counts {counts}")

    @property
    def num_shapes(self) -> int:
        """Number of shapes that the picture must show."""
        return sum(thing.count for thing in self.things)

    @property
    def names_all_colours(self) -> bool:
        """Whether the ground and every thing have a colour."""
        return self.ground is not None and all(thing.colour is not None for thing in self.things)


@dataclass(frozen=True)
class Placed:
    """One shape in a picture; centre and radius are fractions of the side, x to the right and y down."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a ground and one to three shapes that neither touch nor leave the picture."""

    ground: str
    shapes: tuple[Placed, ...]


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _draw_pair(rng: np.random.Generator, num_colours: int) -> tuple[Thing, Thing]:
    """Two things that a reader can tell apart, the first `num_colours` of them (in random order) coloured."""
    while True:
        first, second = Thing(choose(rng, KINDS)), Thing(choose(rng, KINDS))
        if num_colours == 2:
            first, second = replace(first, colour=choose(rng, COLOURS)), replace(second, colour=choose(rng, COLOURS))
            if first.colour != second.colour:
                return first, second
        elif first.kind != second.kind:
            if num_colours == 1:
                first = replace(first, colour=choose(rng, COLOURS))
            return (first, second) if _chance(rng, 0.5) else (second, first)


def _draw_things(rng: np.random.Generator, category: str) -> tuple[Thing, ...]:
    if category == "single_object":
        return (Thing(choose(rng, KINDS)),)
    if category == "colours":
        return (Thing(choose(rng, KINDS), choose(rng, COLOURS)),)
    if category == "counting":
        colour = choose(rng, COLOURS) if _chance(rng, 0.5) else None
        return (Thing(choose(rng, KINDS), colour, count=choose(rng, (1, 2, 2, 2, 2, 3, 3, 3, 3))),)
    if category == "two_objects":
        return _draw_pair(rng, num_colours=choose(rng, (0, 0, 1)))
    if category == "position":
        return _draw_pair(rng, num_colours=choose(rng, (0, 1, 2, 2, 2)))
    return _draw_pair(rng, num_colours=2)


def draw_request(rng: np.random.Generator, category: str | None = None) -> Request:
    """A random request of a category, or of one drawn evenly from the six.

    A category fixes what must be said: one kind (single_object), kind and colour (colours), a number (counting), two
    kinds (two_objects), two things coloured differently (colour_attribution), a relation (position). Sizes, the ground
    and the colours a category does without are said now and then.

    Raises:
        ValueError: `category` is not one of `CATEGORIES`.
    """
    if category is None:
        category = choose(rng, CATEGORIES)
    _check("category", category, CATEGORIES)
    things = tuple(
        replace(thing, size=choose(rng, tuple(SIZES))) if _chance(rng, _SAY_SIZE) else thing
        for thing in _draw_things(rng, category)
    )
    relation = choose(rng, RELATIONS) if category == "position" else None
    return Request(category, things, relation, choose(rng, GROUNDS) if _chance(rng, _SAY_GROUND) else None)


def _draw_centres(rng: np.random.Generator, radii: np.ndarray, relation: str | None) -> np.ndarray:
    """Centres (S, 2) of shapes of the given radii (S,), drawn evenly among those that keep every distance."""
    reach = radii[:, None] + MARGIN
    first, second = np.triu_indices(len(radii), k=1)
    while True:
        centres = reach + rng.random((_LAYOUTS_AT_ONCE, len(radii), 2)) * (1 - 2 * reach)
        offsets = centres[:, second] - centres[:, first]
        # Shapes fill the squares around them at most, so squares that are apart are enough.
        fits = (np.abs(offsets).max(-1) >= radii[first] + radii[second] + GAP).all(-1)
        if relation is not None:
            axis = 0 if relation in ("left of", "right of") else 1
            sign = 1 if relation in ("left of", "above") else -1
            along, across = sign * offsets[:, 0, axis], np.abs(offsets[:, 0, 1 - axis])
            fits &= across <= RELATION_SLOPE * along
        if fits.any():
            return centres[fits.argmax()]


def complete(request: Request, rng: np.random.Generator) -> Scene:
    """A random scene that shows exactly what a request says; what it leaves open is drawn at random.

    The shapes come in the order of the things. Shapes of one thing share colour and size.
    """
    looks = []
    for thing in request.things:
        colour = thing.colour or choose(rng, COLOURS)
        size = thing.size or choose(rng, tuple(SIZES))
        looks += [(thing.kind, colour, size)] * thing.count
    radii = np.array([rng.uniform(*SIZES[size]) for _, _, size in looks])
    centres = _draw_centres(rng, radii, request.relation)
    shapes = tuple(
        Placed(*look, x=float(x), y=float(y), radius=float(radius))
        for look, (x, y), radius in zip(looks, centres, radii, strict=True)
    )
    return Scene(request.ground or choose(rng, GROUNDS), shapes)
