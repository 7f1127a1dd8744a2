"""Two sets of pictures to the Fréchet distance between them, in the eyes of a network and from moments alone.

B pictures, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from sana_sprint.evaluation.batches import batched

# Pictures (B, H, W, 3) uint8 to features (B, D).
FeatureNetwork = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean and scatter of features. The sum of two is that of both sets together.

    Attributes:
        num_pictures: How many rows of features were seen.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum over pictures of the outer product of what differs from the mean.
    """

    num_pictures: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of features (B, D) of any number format.

        Raises:
            ValueError: if they are not (B, D) with B and D at least 1, or not finite.
        """
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or not features.size:
            raise ValueError(f"features must be (pictures, features), at least one of each, got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite numbers, and some are not: look for broken pictures or weights")
        mean = features.mean(axis=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    @property
    def num_features(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), unbiased.

        Raises:
            ValueError: if there are fewer than two pictures.
        """
        if self.num_pictures < 2:
            raise ValueError(f"a covariance needs two pictures or more, got {self.num_pictures}")
        return self.scatter / (self.num_pictures - 1)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets together (Chan, Golub and LeVeque, 1983).

        Raises:
            ValueError: if the numbers of features differ.
        """
        _check_one_width(self, other)
        total = self.num_pictures + other.num_pictures
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.num_pictures / total)
        between = np.outer(difference, difference) * (self.num_pictures * other.num_pictures / total)
        return Moments(total, mean, self.scatter + other.scatter + between)


def _check_one_width(first: Moments, second: Moments) -> None:
    if first.num_features != second.num_features:
        raise ValueError(
            "features of one network can be compared, but these have "
            f"{first.num_features} and {second.num_features} numbers to a picture"
        )


def measure(network: FeatureNetwork, pictures: Iterable[np.ndarray], batch_size: int = 25) -> Moments:
    """The moments of pictures (H, W, 3) uint8, all of one size; no more than a batch of them is held.

    Raises:
        ValueError: if there are none.
    """
    parts = (Moments.of(network(np.stack(batch))) for batch in batched(pictures, batch_size))
    first = next(parts, None)
    if first is None:
        raise ValueError("there are no pictures to measure")
    return reduce(add, parts, first)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A matrix (D, rank) whose product with its own transpose is the covariance (D, D)."""
    values, vectors = np.linalg.eigh(covariance)
    # The eigenvalues of a covariance of few pictures that should be 0 are roundings, of either sign.
    is_kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    return vectors[:, is_kept] * np.sqrt(values[is_kept])


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared Fréchet distance of two normal distributions with these moments, at least 0.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of Dowson and Landau (1982), which Heusel et al. (arXiv 1706.08500) apply
    to features of pictures. With C1 = F1 F1' and C2 = F2 F2' the trace of the root is the sum of the singular values of
    F1' F2: real whatever the rank of the covariances, which is at most the number of pictures less one.

    Raises:
        ValueError: if either has fewer than two pictures, or their numbers of features differ.
    """
    _check_one_width(first, second)
    factors = _factor(first.covariance), _factor(second.covariance)
    overlap = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    spread = sum(np.square(factor).sum() for factor in factors)
    distance = np.square(first.mean - second.mean).sum() + spread - 2 * overlap
    return max(0.0, float(distance))
