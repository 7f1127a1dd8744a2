"""The Fréchet distance against its closed forms, and moments that do not depend on how pictures come."""

import numpy as np
import pytest

from sana_sprint.evaluation.frechet import Moments, frechet_distance, measure

# Float64 and eigenvalues of at most 10: a few hundred roundings of 1e-15, and roots of what should be 0.
CLOSE = {"abs": 1e-9, "rel": 1e-9}


def sample(mean, covariance, num_pictures: int, seed: int = 0) -> np.ndarray:
    """Features (B, D) whose sample mean and unbiased covariance are these, to rounding."""
    mean = np.asarray(mean, dtype=np.float64)
    drawn = np.random.default_rng(seed).normal(size=(num_pictures, len(mean)))
    drawn -= drawn.mean(0)
    whitened = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn.T))).T
    return mean + whitened @ np.linalg.cholesky(np.asarray(covariance, dtype=np.float64)).T


def random_covariance(width: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(width, width + 2))
    return factor @ factor.T / width


def test_independent_features_have_the_distance_of_their_means_and_of_their_deviations():
    first = Moments.of(sample([0, 1, 2], np.diag([1, 4, 9]), 20))
    second = Moments.of(sample([3, 1, 0], np.diag([4, 4, 1]), 30, seed=1))
    assert frechet_distance(first, second) == pytest.approx(9 + 0 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, **CLOSE)


def test_dependent_features_have_the_distance_of_the_formula():
    mean, other_mean = np.zeros(5), np.arange(5)
    covariance, other = random_covariance(5, seed=1), random_covariance(5, seed=2)
    # The eigenvalues of a product of two positive matrices are positive, and those of its root are their roots.
    root = np.sqrt(np.linalg.eigvals(covariance @ other).real).sum()
    expected = 30 + np.trace(covariance) + np.trace(other) - 2 * root
    moments = Moments.of(sample(mean, covariance, 40)), Moments.of(sample(other_mean, other, 50, seed=3))
    assert frechet_distance(*moments) == pytest.approx(expected, **CLOSE)


def test_the_distance_is_symmetric_and_the_same_from_every_point_of_view():
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(40, 6)), rng.normal(size=(30, 6)) * np.arange(6) + 1
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    distance = frechet_distance(Moments.of(first), Moments.of(second))
    assert distance > 1
    assert frechet_distance(Moments.of(second), Moments.of(first)) == pytest.approx(distance, **CLOSE)
    turned = Moments.of(first @ turn + 7), Moments.of(second @ turn + 7)
    assert frechet_distance(*turned) == pytest.approx(distance, **CLOSE)
    enlarged = Moments.of(3 * first), Moments.of(3 * second)
    assert frechet_distance(*enlarged) == pytest.approx(9 * distance, **CLOSE)


@pytest.mark.parametrize("num_pictures", [2, 10, 300])
def test_a_set_has_no_distance_from_itself_even_if_its_covariance_has_no_full_rank(num_pictures):
    moments = Moments.of(np.random.default_rng(5).normal(size=(num_pictures, 100)))
    assert 0 <= frechet_distance(moments, moments) < 1e-9


def test_fewer_pictures_than_features_have_the_distance_of_the_plane_that_they_span():
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(8, 3)), 2 * rng.normal(size=(9, 3))
    into, _ = np.linalg.qr(rng.normal(size=(60, 3)))
    distance = frechet_distance(Moments.of(first), Moments.of(second))
    assert frechet_distance(Moments.of(first @ into.T), Moments.of(second @ into.T)) == pytest.approx(distance, **CLOSE)


def test_features_that_vary_in_different_directions_do_not_overlap():
    rng = np.random.default_rng(7)
    first, second = np.zeros((20, 8)), np.zeros((20, 8))
    first[:, :4], second[:, 4:] = rng.normal(size=(20, 4)), rng.normal(size=(20, 4))
    means = np.square(first.mean(0) - second.mean(0)).sum()
    expected = means + first.var(0, ddof=1).sum() + second.var(0, ddof=1).sum()
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, **CLOSE)


def test_equal_pictures_have_the_distance_of_their_means():
    assert frechet_distance(Moments.of(np.zeros((3, 4))), Moments.of(np.full((5, 4), 2.0))) == 16


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(8).normal(size=(30, 4)).astype(np.float32)
    moments = Moments.of(features)
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_added_are_those_of_all_pictures_at_once(offset):
    features = np.random.default_rng(9).normal(size=(60, 5)) + offset
    parts = [Moments.of(part) for part in np.split(features, [1, 4, 40])]
    added = parts[3] + ((parts[0] + parts[1]) + parts[2])
    at_once = Moments.of(features)
    assert added.num_pictures == 60
    # An offset of 1e6 leaves ten digits of the deviations, and the naive sum of squares would leave four.
    np.testing.assert_allclose(added.mean, at_once.mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(added.scatter, at_once.scatter, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_pictures_measure_the_same_in_batches_of_every_size(batch_size):
    pictures = np.random.default_rng(10).integers(0, 256, size=(20, 4, 6, 3), dtype=np.uint8)

    def means_of_colours(batch: np.ndarray) -> np.ndarray:
        assert batch.dtype == np.uint8
        return batch.mean(axis=(1, 2))

    moments = measure(means_of_colours, iter(pictures), batch_size)
    at_once = Moments.of(pictures.mean(axis=(1, 2)))
    np.testing.assert_allclose(moments.mean, at_once.mean, rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, at_once.covariance, rtol=1e-10)


def test_what_cannot_be_compared_is_refused():
    one, many = Moments.of(np.ones((1, 3))), Moments.of(np.ones((5, 3)))
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        frechet_distance(one, many)
    with pytest.raises(ValueError, match="have 3 and 4 numbers to a picture"):
        frechet_distance(many, Moments.of(np.ones((5, 4))))
    with pytest.raises(ValueError, match="have 3 and 4 numbers to a picture"):
        _ = many + Moments.of(np.ones((5, 4)))
    with pytest.raises(ValueError, match=r"at least one of each, got \(0, 3\)"):
        Moments.of(np.ones((0, 3)))
    with pytest.raises(ValueError, match=r"at least one of each, got \(3,\)"):
        Moments.of(np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        Moments.of(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="no pictures to measure"):
        measure(lambda batch: batch, [])
