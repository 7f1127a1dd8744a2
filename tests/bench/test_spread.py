"""Samples to quartiles, and paired ratios, on numbers whose answers are known."""

import pytest

from sana_sprint.bench.spread import Spread, ratios, spread


def test_quartiles_of_known_samples():
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    assert spread([1.0, 2.0]) == Spread(1.25, 1.5, 1.75)


def test_one_sample_is_all_three():
    assert spread([0.5]) == Spread(0.5, 0.5, 0.5)


def test_ratios_are_of_pairs_so_what_slows_both_down_cancels():
    ours, theirs = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    assert spread(ratios(theirs, ours)) == Spread(2.0, 2.0, 2.0)


def test_samples_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])
