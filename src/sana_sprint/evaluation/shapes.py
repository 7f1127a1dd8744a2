"""A function that draws captions to its scores on the shapes world: right or wrong, as GenEval counts it, and Fréchet.

B pictures, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sana_sprint.evaluation.batches import batched
from sana_sprint.evaluation.frechet import FeatureNetwork, Moments, frechet_distance, measure
from sana_sprint.shapes.judge import score
from sana_sprint.shapes.renderer import render
from sana_sprint.shapes.sampler import draw_example
from sana_sprint.shapes.scenes import CATEGORIES, Request, complete

# Captions to pictures (H, W, 3) uint8, one each, in order; called with a batch of captions and the number drawn before.
DrawCaptions = Callable[[Sequence[str], int], Sequence[np.ndarray]]

_MOST_IN_VAIN = 500  # draws in a row of captions that are there already


@dataclass(frozen=True)
class HeldOutCaptions:
    """Captions that no training example has, with what they request."""

    captions: tuple[str, ...]
    requests: tuple[Request, ...]

    def drawn(self, draw: DrawCaptions, batch_size: int = 25) -> list[np.ndarray]:
        """A picture of each caption, in order."""
        pictures: list[np.ndarray] = []
        for captions in batched(self.captions, batch_size):
            pictures.extend(draw(captions, len(pictures)))
        return pictures

    def rendered(self, size: int, times: int, seed: int) -> Iterator[np.ndarray]:
        """True pictures (size, size, 3) uint8: `times` different scenes of each caption."""
        rng = np.random.default_rng(seed)
        for _ in range(times):
            yield from (render(complete(request, rng), size) for request in self.requests)


def held_out_captions(num_captions: int, seed: int) -> HeldOutCaptions:
    """Distinct held-out captions, the six categories in turn.

    Raises:
        ValueError: for so many that a category has hardly a caption left.
    """
    rng = np.random.default_rng(seed)
    chosen: dict[str, Request] = {}
    in_vain = 0
    while len(chosen) < num_captions:
        category = CATEGORIES[len(chosen) % len(CATEGORIES)]
        example = draw_example(rng, held_out=True, category=category)
        in_vain = in_vain + 1 if example.caption in chosen else 0
        if in_vain == _MOST_IN_VAIN:
            raise ValueError(
                f"{num_captions} captions are too many: of category {category} there are hardly more than the"
                f" {len(chosen) // len(CATEGORIES)} that were found"
            )
        chosen.setdefault(example.caption, example.request)
    return HeldOutCaptions(tuple(chosen), tuple(chosen.values()))


def score_drawing(
    draw: DrawCaptions, num_captions: int = 500, seed: int = 2025, batch_size: int = 25
) -> dict[str, float]:
    """Share of held-out captions that the judge finds drawn, per category, and "overall", the mean of the six."""
    held_out = held_out_captions(num_captions, seed)
    return score(held_out.drawn(draw, batch_size), held_out.requests)


class DistanceToRenderings:
    """The Fréchet distance of drawn pictures to renderings of the very captions that they were drawn from.

    So what the captions are about does not count, but only how they are drawn. The renderings are measured once, at the
    first call.

    Args:
        held_out: The captions.
        network: What the pictures are measured by.
        times: Different renderings of each caption.
        seed: Of their scenes.
    """

    def __init__(self, held_out: HeldOutCaptions, network: FeatureNetwork, times: int = 4, seed: int = 77) -> None:
        self.held_out = held_out
        self.network = network
        self.times = times
        self.seed = seed
        self._renderings: Moments | None = None

    @property
    def num_references(self) -> int:
        """Number of renderings."""
        return self.times * len(self.held_out.captions)

    def __call__(self, pictures: Sequence[np.ndarray]) -> float:
        """Pictures (H, H, 3) uint8, one of each caption, to their distance."""
        if self._renderings is None:
            rendered = self.held_out.rendered(pictures[0].shape[0], self.times, self.seed)
            self._renderings = measure(self.network, rendered)
        return frechet_distance(measure(self.network, pictures), self._renderings)
