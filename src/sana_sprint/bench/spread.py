"""Samples to their median and quartiles."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple


class Spread(NamedTuple):
    """The middle of samples, and the quarters below and above it."""

    lower: float
    median: float
    upper: float


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation between the samples, of which one is enough."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    lower, _, upper = quantiles(samples, n=4, method="inclusive")
    return Spread(lower, median(samples), upper)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Sample by sample: what slows a machine down for a while slows the two of a pair alike."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]
