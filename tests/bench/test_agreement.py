"""How far two results are apart, on vectors whose answers are known, and what counts as agreement."""

import math

import pytest
import torch

from sana_sprint.bench import agreement
from sana_sprint.bench.agreement import BOUNDS, Agreement, bound_for, compare, worst

CPU = torch.device("cpu")


def test_error_and_cosine_of_known_vectors():
    reference = torch.tensor([[3.0, 4.0]])
    assert compare(reference, reference) == (0.0, pytest.approx(1.0))
    assert compare(torch.tensor([[4.0, -3.0]]), reference) == (pytest.approx(math.sqrt(2)), pytest.approx(0.0))
    assert compare(2 * reference, reference) == (pytest.approx(1.0), pytest.approx(1.0))


def test_half_precision_is_summed_up_without_overflow():
    reference = torch.full((1000,), 1000.0, dtype=torch.float16)
    assert compare(reference * 1.5, reference).relative_error == pytest.approx(0.5)


def test_results_too_large_for_one_piece_are_summed_up_whole(monkeypatch):
    monkeypatch.setattr(agreement, "_NUMBERS_AT_ONCE", 3)
    found, reference = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.cosine_similarity(found.flatten(), reference.flatten(), dim=0).item()
    error = ((found - reference).norm() / reference.norm()).item()
    assert compare(found, reference) == (pytest.approx(error), pytest.approx(expected))


def test_nothing_to_compare_with_is_no_agreement():
    assert not compare(torch.ones(2), torch.zeros(2)).holds(1e9)


def test_results_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"got \(2,\) here, \(3,\) there"):
        compare(torch.ones(2), torch.ones(3))


def test_what_is_not_a_number_never_agrees_and_is_the_worst():
    broken = compare(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert not broken.holds(1e9)
    for order in ([broken, Agreement(5.0, 0.0)], [Agreement(5.0, 0.0), broken]):
        assert worst(order) is broken


def test_the_worst_has_the_largest_error():
    assert worst([Agreement(0.1, 0.9), Agreement(0.3, 0.8), Agreement(0.2, 0.7)]) == Agreement(0.3, 0.8)


def test_an_error_agrees_up_to_the_bound():
    assert Agreement(0.01, 1.0).holds(0.01)
    assert not Agreement(0.011, 1.0).holds(0.01)


def test_bounds_grow_with_the_rounding_of_the_dtype():
    rounding = sorted(BOUNDS, key=lambda dtype: torch.finfo(dtype).eps)
    assert rounding == sorted(BOUNDS, key=BOUNDS.__getitem__)
    assert all(BOUNDS[dtype] > torch.finfo(dtype).eps for dtype in BOUNDS)


def test_float32_on_cuda_may_round_as_tf32_does(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert bound_for(torch.float32, cuda) == BOUNDS[torch.float16]
    assert bound_for(torch.float32, CPU) == BOUNDS[torch.float32]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert bound_for(torch.float32, cuda) == BOUNDS[torch.float32]
