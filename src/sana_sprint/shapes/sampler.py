"""A random generator in, an example out: a request with a caption of it and a scene that fulfils it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sana_sprint.shapes.captions import describe, is_held_out
from sana_sprint.shapes.scenes import Request, Scene, complete, draw_request


@dataclass(frozen=True)
class Example:
    """What is said, what is drawn, and the words for it."""

    request: Request
    scene: Scene
    caption: str


def draw_example(rng: np.random.Generator, held_out: bool = False, category: str | None = None) -> Example:
    """An example whose caption is held out, or is not; categories are balanced either way.

    Raises:
        ValueError: `category` is not one of `scenes.CATEGORIES`.
    """
    request = draw_request(rng, category)
    caption = describe(request, rng)
    while is_held_out(caption) != held_out:
        # The category stays, or those with few held-out captions would come up less often.
        request = draw_request(rng, request.category)
        caption = describe(request, rng)
    return Example(request, complete(request, rng), caption)
