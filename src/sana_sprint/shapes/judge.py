"""Pixels in; the shapes seen, and whether they are what a request says, out.

The judge knows the palette and the outlines of the shapes, never the scene, so it serves drawn and generated pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from sana_sprint.shapes.palette import GROUND_COLOURS, MINIMUM_DISTANCE, PALETTE, SHAPE_COLOURS, oklab
from sana_sprint.shapes.renderer import coverage
from sana_sprint.shapes.scenes import CATEGORIES, KINDS, SIZE_BOUNDARY, Placed, Request, Thing

# A measured colour further than this from every colour of the palette (OKLab) is none of them. Half the distance
# between the closest two, and then some: drift in lightness, which says little about the name, counts as well.
_COLOUR_TOLERANCE = 0.7 * MINIMUM_DISTANCE
# Least distance from the ground, in sRGB steps, of a pixel that can belong to a shape; the palette's least is 127. Not
# OKLab, in which the noise of a black ground is as large as a colour.
_CONTRAST = 60.0
# Share of the border that must look like the ground.
_GROUND_SHARE = 0.8
# Share of the picture's area below which a patch is a stray, and the share that all strays together may cover.
# The smallest shape, a small star, covers 0.015.
_STRAY_AREA = 0.003
_STRAY_TOTAL = 0.015
# Least agreement (intersection over union) of a patch with the best outline of its area, per kind: above what shapes of
# other kinds reach (a circle and a square 0.84; a pentagon and a star 0.76), below what a wobble of a pixel leaves.
_LEAST_AGREEMENT = {"circle": 0.87, "square": 0.87, "triangle": 0.80, "star": 0.78, "cross": 0.78}
# By how much it must beat the next kind: a square with corners so round that it could be either is neither.
_LEAST_LEAD = 0.04
# Least agreement when the softness of the edge counts too: at 64 pixels a blur of 2 leaves a small circle 0.67.
_LEAST_SHARPNESS = 0.7
# Radii that a sighting may have, as fractions of the side: the world's range and some tolerance.
_RADIUS_RANGE = (0.08, 0.23)

_COLOUR_NAMES = tuple(PALETTE)
_COLOUR_LABS = oklab(np.array(list(PALETTE.values())))
_SHAPE_NAMES = tuple(SHAPE_COLOURS)
_SHAPE_RGB = np.array(list(SHAPE_COLOURS.values()), dtype=np.float64)


def _measure_kind(kind: str) -> tuple[float, float]:
    """Area and height of the centroid of a shape of radius 1, from a fine rendering."""
    steps = (np.arange(400) + 0.5) / 200 - 1
    covered = coverage(kind, steps[None, :] * 200, steps[:, None] * 200, 200.0)
    return float(covered.mean() * 4), float((covered * steps[:, None]).sum() / covered.sum())


_PROPORTIONS = {kind: _measure_kind(kind) for kind in KINDS}


@dataclass(frozen=True)
class Sighting:
    """What a picture shows: its ground (None where there is no clear one), its shapes, and blobs that are none."""

    ground: str | None
    shapes: tuple[Placed, ...]
    num_blobs: int = 0


@dataclass(frozen=True)
class Painting:
    """Where a picture has the colour of a shape, and which colours it has, whatever the outlines are."""

    foreground: np.ndarray  # H W, bool
    ground: str | None  # None where there is no clear one
    colours: frozenset[str | None]  # of the patches; None for one of no known colour


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is what was asked, and if not, why not."""

    correct: bool
    reasons: tuple[str, ...] = ()


def _name_colour(rgb: np.ndarray) -> str | None:
    distances = np.linalg.norm(_COLOUR_LABS - oklab(rgb), axis=-1)
    nearest = int(distances.argmin())
    return _COLOUR_NAMES[nearest] if distances[nearest] <= _COLOUR_TOLERANCE else None


def _label(regions: np.ndarray) -> np.ndarray:
    """Connected patches (4 neighbours) of equal entries of an integer map (H, W); negative entries stay -1.

    Every pixel starts with its own number and takes the largest among its neighbours of the same region, until none
    changes. Taking the label of the pixel that its label names, too, keeps the number of rounds small.
    """
    height, width = regions.shape
    labels = np.where(regions >= 0, np.arange(height * width).reshape(height, width), -1)
    joined_down = regions[1:] == regions[:-1]
    joined_right = regions[:, 1:] == regions[:, :-1]
    while True:
        before = labels.copy()
        for joined, one, other in (
            (joined_down, labels[1:], labels[:-1]),
            (joined_right, labels[:, 1:], labels[:, :-1]),
        ):
            largest = np.where(joined, np.maximum(one, other), -1)
            np.maximum(one, largest, out=one, where=joined)
            np.maximum(other, largest, out=other, where=joined)
        labels = np.where(labels >= 0, labels.ravel()[labels], -1)
        if (labels == before).all():
            return labels


def _spread(values: np.ndarray, steps: int) -> np.ndarray:
    """Largest value within `steps` pixels along both axes, of a map (H, W)."""
    for axis in (0, 1):
        lines = np.moveaxis(values, axis, 0)
        for _ in range(steps):
            spread = lines.copy()
            np.maximum(spread[1:], lines[:-1], out=spread[1:])
            np.maximum(spread[:-1], lines[1:], out=spread[:-1])
            lines = spread
        values = np.moveaxis(lines, 0, axis)
    return values


def _regions(picture: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Index of the shape colour that each pixel (H, W) belongs to, -1 for the ground.

    The pixels of a soft edge are mixtures: white and red make a pink. So a pixel is compared with the whole segment
    from the ground to a colour, and belongs to a shape where it is more than half as far from the ground as the pixels
    next to it.
    """
    contrast = np.linalg.norm(picture - ground, axis=-1)
    reach = max(1, round(picture.shape[0] / 64))
    is_shape = contrast > np.maximum(_CONTRAST, 0.5 * _spread(contrast, reach))
    offsets = picture[is_shape] - ground  # P 3
    directions = _SHAPE_RGB - ground  # 8 3
    share = np.clip((offsets @ directions.T) / (directions**2).sum(-1), 0.0, 1.0)
    rest = np.linalg.norm(offsets[:, None] - share[..., None] * directions, axis=-1)
    regions = np.full(contrast.shape, -1)
    regions[is_shape] = rest.argmin(-1)
    return regions


@dataclass(frozen=True)
class _Fit:
    """How well an outline fits a patch, with the edges steepened and as they are; centre and radius in pixels."""

    agreement: float
    sharpness: float
    kind: str
    x: float
    y: float
    radius: float


def _steepen(shares: np.ndarray) -> np.ndarray:
    """Shares of a shape's colour made steeper about one half, where the outline runs however soft the edge is."""
    return np.clip(4 * shares - 1.5, 0.0, 1.0)


def _agreement(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def _fit_kinds(shares: np.ndarray) -> list[_Fit]:
    """Outlines with the area and centroid of a map of shares (H, W), one per kind, the best first."""
    steep = _steepen(shares)
    rows, columns = np.arange(shares.shape[0]) + 0.5, np.arange(shares.shape[1]) + 0.5
    total = steep.sum()
    x, centroid_y = float(steep.sum(0) @ columns / total), float(steep.sum(1) @ rows / total)
    fits = []
    for kind, (area, offset) in _PROPORTIONS.items():
        radius = float(np.sqrt(total / area))
        y = centroid_y - offset * radius
        outline = coverage(kind, columns[None, :] - x, rows[:, None] - y, radius)
        fits.append(_Fit(_agreement(steep, _steepen(outline)), _agreement(shares, outline), kind, x, y, radius))
    return sorted(fits, key=lambda fit: -fit.agreement)


def _window(patch: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Rows and columns that a patch (H, W), bool, and a margin around it take."""
    places = [np.flatnonzero(patch.any(axis)) for axis in (1, 0)]
    rows, columns = (slice(max(0, int(found[0]) - margin), int(found[-1]) + margin + 1) for found in places)
    return rows, columns


def _recognise(picture: np.ndarray, ground: np.ndarray, patch: np.ndarray, others: np.ndarray) -> Placed | None:
    """The shape that a patch (H, W), bool, shows; None if it is none. `others` marks the other patches."""
    size = picture.shape[0]
    margin = max(4, size // 16)
    rows, columns = _window(patch, margin)
    colours, patch, others = picture[rows, columns], patch[rows, columns], others[rows, columns]
    rgb = _patch_colour(colours, patch)
    colour = _name_colour(rgb)
    if colour not in SHAPE_COLOURS:
        return None
    # A soft edge around the patch belongs to it, so that blur can be told; the edge of another patch does not.
    near = patch | (_spread(patch, margin) & ~_spread(others, max(2, size // 32)))
    direction = rgb - ground
    shares = np.where(near, np.clip((colours - ground) @ direction / (direction @ direction), 0.0, 1.0), 0.0)
    fit, runner_up, *_ = _fit_kinds(shares)
    x, y, radius = (fit.x + columns.start) / size, (fit.y + rows.start) / size, fit.radius / size
    if (
        fit.agreement < _LEAST_AGREEMENT[fit.kind]
        or fit.agreement - runner_up.agreement < _LEAST_LEAD
        or fit.sharpness < _LEAST_SHARPNESS
        or not _RADIUS_RANGE[0] <= radius <= _RADIUS_RANGE[1]
    ):
        return None
    return Placed(fit.kind, colour, "small" if radius < SIZE_BOUNDARY else "large", x, y, radius)


def _patch_colour(colours: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """The median sRGB colour of a patch (H, W), bool, of a picture (H, W, 3), without its edge if it has more."""
    inner = ~_spread(~patch, 1)
    return np.median(colours[inner if inner.any() else patch], axis=0)


def _check(picture: np.ndarray) -> None:
    if picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture must be uint8 of shape (S, S, 3), got {picture.dtype} of shape {picture.shape}")


def _find_ground(colours: np.ndarray) -> tuple[np.ndarray, str | None]:
    """The colour of the border of a picture (H, W, 3), and its name; None where it is no ground's, or not clear."""
    border = np.concatenate([colours[0], colours[-1], colours[1:-1, 0], colours[1:-1, -1]])
    ground = np.median(border, axis=0)
    name = _name_colour(ground)
    is_ground = np.linalg.norm(border - ground, axis=-1) < _CONTRAST
    return ground, name if name in GROUND_COLOURS and is_ground.mean() >= _GROUND_SHARE else None


def find_colours(picture: np.ndarray) -> Painting:
    """The colours of a picture, uint8 (S, S, 3), and where those of shapes are; outlines do not matter, strays neither.

    Raises:
        ValueError: The picture is not square, RGB and uint8.
    """
    _check(picture)
    colours = picture.astype(np.float64)
    ground, name = _find_ground(colours)
    labels = _label(_regions(colours, ground))
    values, areas = np.unique(labels[labels >= 0], return_counts=True)
    patches = values[areas >= _STRAY_AREA * labels.size]
    named = frozenset(_name_colour(_patch_colour(colours, labels == patch)) for patch in patches)
    return Painting(labels >= 0, name, named)


def find_shapes(picture: np.ndarray) -> Sighting:
    """Ground and shapes of a picture, uint8 (S, S, 3), found from its pixels alone.

    Soft edges, a little drift of the colours and single stray pixels are tolerated. A larger patch of a shape's colour
    that does not have the outline of a shape counts as a blob, and so do many strays together.

    Raises:
        ValueError: The picture is not square, RGB and uint8.
    """
    _check(picture)
    colours = picture.astype(np.float64)
    ground, name = _find_ground(colours)
    if name is None:
        return Sighting(None, (), 1)
    labels = _label(_regions(colours, ground))
    values, areas = np.unique(labels[labels >= 0], return_counts=True)
    is_stray = areas < _STRAY_AREA * labels.size
    is_patch = np.isin(labels, values[~is_stray])
    seen = [_recognise(colours, ground, labels == patch, is_patch & (labels != patch)) for patch in values[~is_stray]]
    num_blobs = seen.count(None) + int(areas[is_stray].sum() > _STRAY_TOTAL * labels.size)
    return Sighting(name, tuple(shape for shape in seen if shape is not None), num_blobs)


def _holds(relation: str, first: Placed, second: Placed) -> bool:
    """Whether the offset from the first to the second is mainly along the relation's axis, and the right way."""
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    return (along if relation in ("left of", "above") else -along) > abs(across)


def _unlike(thing: Thing, shape: Placed) -> list[str]:
    said = ((thing.kind, shape.kind), (thing.colour, shape.colour), (thing.size, shape.size))
    return [f"wanted {wanted}, found {found}" for wanted, found in said if wanted is not None and wanted != found]


def _match(request: Request, shapes: Sequence[Placed]) -> list[str]:
    """What is wrong with the shapes, paired with the things as well as they can be."""
    wanted = [thing for thing in request.things for _ in range(thing.count)]
    complaints = []
    for order in permutations(shapes):
        wrong = [reason for thing, shape in zip(wanted, order, strict=True) for reason in _unlike(thing, shape)]
        if request.relation is not None and not _holds(request.relation, order[0], order[1]):
            wrong.append(f"the first is not {request.relation} the second")
        complaints.append(wrong)
    return min(complaints, key=len)


def judge(picture: np.ndarray, request: Request) -> Verdict:
    """Whether a picture, uint8 (S, S, 3), shows what a request says: all of it, and no shape or blob beside it.

    Raises:
        ValueError: The picture is not square, RGB and uint8.
    """
    seen = find_shapes(picture)
    if seen.ground is None:
        return Verdict(False, ("the border shows no ground colour",))
    reasons = []
    if request.ground is not None and seen.ground != request.ground:
        reasons.append(f"wanted a {request.ground} ground, found {seen.ground}")
    if seen.num_blobs:
        reasons.append(f"{seen.num_blobs} blob(s) that are no shape")
    if len(seen.shapes) != request.num_shapes:
        reasons.append(f"wanted {request.num_shapes} shape(s), found {len(seen.shapes)}")
    else:
        reasons += _match(request, seen.shapes)
    return Verdict(not reasons, tuple(reasons))


def score(pictures: Sequence[np.ndarray], requests: Sequence[Request]) -> dict[str, float]:
    """Share of correct pictures per category, and "overall", the mean over categories as in GenEval.

    Categories without a request are left out, of the mean too.

    Raises:
        ValueError: There are not as many pictures as requests, or there are none.
    """
    if len(pictures) != len(requests) or not len(pictures):
        raise ValueError(f"one request per picture wanted, got {len(pictures)} pictures and {len(requests)} requests")
    verdicts: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for picture, request in zip(pictures, requests, strict=True):
        verdicts[request.category].append(judge(picture, request).correct)
    shares = {category: sum(found) / len(found) for category, found in verdicts.items() if found}
    return {**shares, "overall": sum(shares.values()) / len(shares)}
