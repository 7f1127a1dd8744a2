"""A function that draws captions to its score on the shapes world, per category, as GenEval counts it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sana_sprint.shapes.judge import score
from sana_sprint.shapes.sampler import draw_example
from sana_sprint.shapes.scenes import CATEGORIES, Request

# Captions to pictures (H, W, 3) uint8, one each, in order; called with a batch of captions and the number drawn before.
DrawCaptions = Callable[[Sequence[str], int], Sequence[np.ndarray]]


@dataclass(frozen=True)
class HeldOutCaptions:
    """Captions that no training example has, with what they request."""

    captions: tuple[str, ...]
    requests: tuple[Request, ...]

    def batches(self, size: int) -> Iterator[tuple[int, Sequence[str]]]:
        for start in range(0, len(self.captions), size):
            yield start, self.captions[start : start + size]


def held_out_captions(num_captions: int, seed: int) -> HeldOutCaptions:
    """Distinct held-out captions, the six categories in turn."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, Request] = {}
    while len(chosen) < num_captions:
        example = draw_example(rng, held_out=True, category=CATEGORIES[len(chosen) % len(CATEGORIES)])
        chosen.setdefault(example.caption, example.request)
    return HeldOutCaptions(tuple(chosen), tuple(chosen.values()))


def score_drawing(
    draw: DrawCaptions, num_captions: int = 500, seed: int = 2025, batch_size: int = 25
) -> dict[str, float]:
    """Share of held-out captions that the judge finds drawn, per category, and "overall", the mean of the six."""
    held_out = held_out_captions(num_captions, seed)
    pictures: list[np.ndarray] = []
    for start, captions in held_out.batches(batch_size):
        pictures.extend(draw(captions, start))
    return score(pictures, held_out.requests)
