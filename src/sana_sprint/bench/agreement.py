"""Two results that ought to be equal to how far they are apart, and whether rounding explains it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

# Of the relative error. Both sides round after every operation, each in its own order. Networks as deep as the
# published ones, but narrow, differed by at most 1.2e-6, 0.022 and 0.0028 in all cases; wider ones sum up more terms.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Of products in float8, which round for speed and not by accident: what is larger is a mistake all the same.
# Weights alone differed by 0.068 at full size; to round the other factor too adds about as much again, squared.
FLOAT8_BOUND = 0.15

# Taken in float64 at a time: a batch of large pictures would not fit beside the networks.
_NUMBERS_AT_ONCE = 2**22


class Agreement(NamedTuple):
    """How far a result is from the reference.

    Attributes:
        relative_error: norm of the difference over that of the reference.
        cosine: of the angle between the two, as vectors.
    """

    relative_error: float
    cosine: float

    def holds(self, bound: float) -> bool:
        """Whether the error is no larger than a bound, which is not so for what is not a number."""
        return self.relative_error <= bound


def compare(found: torch.Tensor, reference: torch.Tensor) -> Agreement:
    """The agreement of two tensors of one shape, summed up in float64.

    Raises:
        ValueError: if the shapes differ.
    """
    if found.shape != reference.shape:
        raise ValueError(f"results must have one shape, got {tuple(found.shape)} here, {tuple(reference.shape)} there")
    parts = zip(found.flatten().split(_NUMBERS_AT_ONCE), reference.flatten().split(_NUMBERS_AT_ONCE))
    difference, ours, theirs, product = torch.stack([_products(*part) for part in parts]).sum(dim=0).tolist()
    norms = math.sqrt(ours * theirs)
    return Agreement(_ratio(math.sqrt(difference), math.sqrt(theirs)), _ratio(product, norms))


def _products(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Of their difference with itself, of each with itself, and of both."""
    found, reference = found.double(), reference.double()
    pairs = ((found - reference,) * 2, (found,) * 2, (reference,) * 2, (found, reference))
    return torch.stack([left @ right for left, right in pairs])


def _ratio(numerator: float, denominator: float) -> float:
    """Not a number where the denominator is 0."""
    return numerator / denominator if denominator else math.nan


def worst(agreements: Sequence[Agreement]) -> Agreement:
    """That with the largest error; what is not a number is larger than any number."""
    return max(agreements, key=lambda one: (math.isnan(one.relative_error), one.relative_error))


def bound_for(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error that rounding explains."""
    # There, float32 convolutions round their inputs to TF32, which has float16's digits, unless that is switched off.
    is_tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return BOUNDS[torch.float16 if is_tf32 else dtype]
