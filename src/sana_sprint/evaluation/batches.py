"""Many items to lists of a few."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in order, in lists of `size`; the last may be shorter. Nothing is read before it is needed."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
