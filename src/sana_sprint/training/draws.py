"""A seed and a step to all random numbers of that step, however many processes and micro-steps share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Draws:
    """The random numbers of one of the equal parts that a step's global batch is cut into.

    Every example has a generator of its own, seeded with (seed, step, place in the global batch). A part therefore
    draws for its own examples alone, and an example gets the same numbers whichever part it falls into: two processes
    with half the batch each, or two micro-steps, make the step that one process makes with all of it.

    Numbers are drawn on the CPU, so that a seed means the same on every device. The first dimension of all results is
    the part's size.
    """

    seed: int
    step: int  # counted from 0
    part: int  # counted from 0
    parts: int
    rng: np.random.Generator  # of the step: the same in every part
    examples: Sequence[np.random.Generator]  # of this part
    device: torch.device

    @classmethod
    def of_step(
        cls, seed: int, step: int, size: int, part: int = 0, parts: int = 1, device: str | torch.device = "cpu"
    ) -> "Draws":
        """The draws for the `size` examples of one part of a step."""
        examples = [
            np.random.default_rng(np.random.SeedSequence((seed, step), spawn_key=(place,)))
            for place in range(part * size, (part + 1) * size)
        ]
        return cls(seed, step, part, parts, np.random.default_rng((seed, step)), examples, torch.device(device))

    @property
    def size(self) -> int:
        """Number of examples in this part."""
        return len(self.examples)

    def normal(self, shape: Sequence[int] = ()) -> torch.Tensor:
        """Standard normal numbers, of a shape for each example, in float32."""
        return self._stack(lambda rng: rng.standard_normal(tuple(shape), dtype=np.float32))

    def uniform(self, shape: Sequence[int] = ()) -> torch.Tensor:
        """Numbers from 0 to below 1, of a shape for each example, in float32."""
        return self._stack(lambda rng: rng.random(tuple(shape), dtype=np.float32))

    def integers(self, high: int) -> torch.Tensor:
        """Whole numbers from 0 to below `high`, one for each example, in int64."""
        return self._stack(lambda rng: rng.integers(high))

    def choice(self, values: Sequence[float]) -> torch.Tensor:
        """One of the values for each example, all equally likely, in float32."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)[self.integers(len(values))]

    def _stack(self, draw: Callable[[np.random.Generator], np.ndarray | np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.stack([draw(rng) for rng in self.examples])).to(self.device)
