"""A function that draws by edges and colours to its scores on the shapes world: right in place, and right in colour.

H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sana_sprint.conditioning.edges import edges
from sana_sprint.evaluation.batches import batched
from sana_sprint.evaluation.shapes import DrawCaptions, held_out_captions
from sana_sprint.shapes.captions import are_words_held_out, describe, describe_colours, is_held_out
from sana_sprint.shapes.judge import find_colours, score
from sana_sprint.shapes.renderer import cover, render
from sana_sprint.shapes.scenes import CATEGORIES, COLOURS, GROUNDS, Request, Scene, choose, complete, draw_request

# Captions and drawings to pictures (H, W, 3) uint8, one each, in order; called with a batch of both and the number of
# pictures drawn before.
DrawControlled = Callable[[Sequence[str], Sequence[Image.Image], int], Sequence[np.ndarray]]

_WORDINGS_TRIED = 200


@dataclass(frozen=True)
class HeldOutScenes:
    """Scenes that no training caption describes in full, with what is said of them."""

    scenes: tuple[Scene, ...]
    colour_captions: tuple[str, ...]  # name the colours only, in words that no training caption has
    full_captions: tuple[str, ...]  # name kinds, colours and ground, and are held out


def _held_out_request(rng: np.random.Generator, category: str) -> tuple[Request, str]:
    """A request that leaves no colour open, and a held-out caption of it."""
    while True:
        request = draw_request(rng, category)
        things = tuple(replace(thing, colour=thing.colour or choose(rng, COLOURS)) for thing in request.things)
        request = replace(request, things=things, ground=request.ground or choose(rng, GROUNDS))
        caption = describe(request, rng)
        if is_held_out(caption):
            return request, caption


def _held_out_colours(scene: Scene, rng: np.random.Generator) -> str | None:
    """A held-out caption of the scene's colours; None where all of its few wordings are trained on."""
    captions = (describe_colours(scene, rng) for _ in range(_WORDINGS_TRIED))
    return next(filter(are_words_held_out, captions), None)


def held_out_scenes(num_scenes: int, seed: int) -> HeldOutScenes:
    """Distinct held-out scenes, the six categories in turn."""
    rng = np.random.default_rng(seed)
    found: dict[str, tuple[Scene, str]] = {}
    while len(found) < num_scenes:
        request, caption = _held_out_request(rng, CATEGORIES[len(found) % len(CATEGORIES)])
        scene = complete(request, rng)
        colour_caption = _held_out_colours(scene, rng)
        if colour_caption is not None:
            found.setdefault(caption, (scene, colour_caption))
    scenes, colour_captions = zip(*found.values(), strict=True)
    return HeldOutScenes(scenes, colour_captions, tuple(found))


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> float:
    """Agreement of two masks (H, W), bool; 1 for two empty ones."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def score_places(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> float:
    """How well what stands out from the ground covers the shapes of the scenes: mean intersection over union."""
    agreements = [
        intersection_over_union(find_colours(picture).foreground, cover(scene, len(picture)))
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
    return float(np.mean(agreements))


def score_colours(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> float:
    """Share of pictures with the ground and the colours of the scenes, and no other; outlines and numbers are free."""
    correct = []
    for picture, scene in zip(pictures, scenes, strict=True):
        found = find_colours(picture)
        correct.append(found.ground == scene.ground and found.colours == {shape.colour for shape in scene.shapes})
    return float(np.mean(correct))


def edges_of(scenes: Sequence[Scene], size: int) -> list[Image.Image]:
    """The edges of scenes, each rendered in so many pixels."""
    return [edges(render(scene, size)) for scene in scenes]


def _drawn(
    draw: DrawControlled, captions: Sequence[str], scenes: Sequence[Scene], size: int, batch_size: int
) -> list[np.ndarray]:
    """A picture of each caption by the edges of its scene."""
    pictures: list[np.ndarray] = []
    for pairs in batched(list(zip(captions, edges_of(scenes, size), strict=True)), batch_size):
        some_captions, some_drawings = zip(*pairs)
        pictures.extend(draw(some_captions, some_drawings, len(pictures)))
    return pictures


def score_control(
    draw: DrawControlled, num_scenes: int = 500, seed: int = 2025, batch_size: int = 25, size: int = 64
) -> dict[str, float]:
    """Scores of drawing held-out scenes from their edges and a caption that names their colours only.

    Args:
        draw: What draws.
        num_scenes: How many.
        seed: Of the scenes.
        batch_size: Captions and drawings at once.
        size: Of the drawings, in pixels.

    Returns:
        "intersection_over_union" (`score_places`) and "colours" (`score_colours`).
    """
    held_out = held_out_scenes(num_scenes, seed)
    pictures = _drawn(draw, held_out.colour_captions, held_out.scenes, size, batch_size)
    return {
        "intersection_over_union": score_places(pictures, held_out.scenes),
        "colours": score_colours(pictures, held_out.scenes),
    }


def score_base_colours(draw: DrawCaptions, num_scenes: int = 500, seed: int = 2025, batch_size: int = 25) -> float:
    """What `score_control` calls "colours", of a model without drawings, which is told the kinds of the shapes instead.

    The scenes are the same, and so are their colours.
    """
    held_out = held_out_scenes(num_scenes, seed)
    pictures: list[np.ndarray] = []
    for captions in batched(held_out.full_captions, batch_size):
        pictures.extend(draw(captions, len(pictures)))
    return score_colours(pictures, held_out.scenes)


def score_open_captions(
    draw: DrawControlled, num_captions: int = 500, seed: int = 2025, batch_size: int = 25, size: int = 64
) -> float:
    """The judge's overall score of drawing any held-out captions, each by the edges of a scene that fulfils it.

    The captions are those of `score_drawing`, of which most leave the ground or a colour open.
    """
    held_out = held_out_captions(num_captions, seed)
    rng = np.random.default_rng((seed, 1))
    scenes = [complete(request, rng) for request in held_out.requests]
    return score(_drawn(draw, held_out.captions, scenes, size, batch_size), held_out.requests)["overall"]
