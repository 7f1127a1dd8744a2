"""Examples sorted by bucket to the batch of any step: one bucket in each, every example in every epoch."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np

from sana_sprint.training.draws import Draws

T = TypeVar("T")

_ORDER = 1  # sets these random numbers apart from a step's own, which come from (seed, step)


class BucketOrder:
    """The order of examples, from seed and epoch alone.

    An epoch shuffles every bucket and cuts it into batches, the last of which is filled up from the bucket's beginning;
    then it shuffles all batches. An epoch has the same number of steps each time, so the batch of a step is known
    without those before it.

    Args:
        buckets: That of each example; any values that can be told apart, None for an example that is never drawn.

    Raises:
        ValueError: if there are no examples to draw.
    """

    def __init__(self, buckets: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {None: -1}
        self.bucket_of = np.array([numbers.setdefault(bucket, len(numbers) - 1) for bucket in buckets])
        if len(numbers) == 1:
            raise ValueError(f"none of {len(buckets)} examples can be drawn")
        self.members = [np.flatnonzero(self.bucket_of == number) for number in range(len(numbers) - 1)]
        self._latest: tuple[tuple[int, int, int], np.ndarray] | None = None

    def steps_per_epoch(self, size: int) -> int:
        """Number of batches of `size` that hold every example."""
        return sum(-(-len(members) // size) for members in self.members)

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """The examples (size,) of a step, which is counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch(size))
        key = (seed, epoch, size)
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self._epoch(*key)
        return self._latest[1][place]

    def _epoch(self, seed: int, epoch: int, size: int) -> np.ndarray:
        """All batches of an epoch (steps, size)."""
        rng = np.random.default_rng((seed, epoch, _ORDER))
        batches = [
            np.resize(rng.permutation(members), (-(-len(members) // size), size))  # repeats what there is
            for members in self.members
        ]
        return rng.permutation(np.concatenate(batches))

    def replacements(self, index: int) -> Iterator[int]:
        """An example, then the others of its bucket as they follow it."""
        members = self.members[self.bucket_of[index]]
        place = int(np.searchsorted(members, index))
        return map(int, chain(members[place:], members[:place]))


def places(draws: Draws) -> range:
    """Where a part's examples are in the batch of the whole step."""
    return range(draws.part * draws.size, (draws.part + 1) * draws.size)


def first_good(candidates: Iterable[int], attempt: Callable[[int], T | None]) -> tuple[int, T] | None:
    """The first example that can be read, with its number; None if there is none."""
    return next(((index, read) for index in candidates if (read := attempt(index)) is not None), None)


def read_part(order: BucketOrder, attempt: Callable[[int, int], T | None], draws: Draws) -> list[tuple[int, T]]:
    """The examples of a part of a step, with their numbers.

    The place of one that cannot be read is taken by the next good one of its bucket. If a bucket has none, the next
    batch takes the place of this one; every part finds that out for itself, so they agree.

    Args:
        order: Of all examples.
        attempt: Reads an example for a place in the whole batch, by place and number; None if that fails.
        draws: Those of the part.

    Raises:
        ValueError: if no example can be read.
    """
    size = draws.size * draws.parts
    # Two epochs' worth of steps, wherever they begin, hold one whole epoch.
    for later in range(draws.step, draws.step + 2 * order.steps_per_epoch(size)):
        chosen = order.batch(draws.seed, later, size)
        found = (first_good(order.replacements(chosen[place]), partial(attempt, place)) for place in places(draws))
        read = [one for one in found if one is not None]
        if len(read) == draws.size:
            return read
    raise ValueError(f"none of {len(order.bucket_of)} examples can be read")
