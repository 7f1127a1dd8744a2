"""The order of training: every example in every epoch, one bucket in a batch, the same for every division of it."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from sana_sprint.training.datasets.order import BucketOrder, read_part
from sana_sprint.training.draws import Draws

BUCKETS = ["wide"] * 7 + ["square"] * 12 + ["tall"]


def epoch(order, number, size=4, seed=3):
    steps = order.steps_per_epoch(size)
    return [order.batch(seed, step, size) for step in range(number * steps, (number + 1) * steps)]


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_epoch_holds_every_example_in_batches_of_one_bucket(number):
    batches = epoch(BucketOrder(BUCKETS), number)
    assert len(batches) == 2 + 3 + 1
    assert all(len({BUCKETS[index] for index in batch}) == 1 for batch in batches)
    drawn = Counter(np.concatenate(batches).tolist())
    assert drawn.keys() == set(range(20))
    # 7 wide ones in 8 places, 12 square ones in 12, and the tall one in all 4 of its batch.
    assert sorted(drawn.values()) == [1] * 18 + [2, 4]


def test_a_step_has_the_same_batch_whatever_was_asked_before():
    order = BucketOrder(BUCKETS)
    forwards = [order.batch(3, step, 4).tolist() for step in range(30)]
    assert [BucketOrder(BUCKETS).batch(3, step, 4).tolist() for step in reversed(range(30))] == forwards[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    order = BucketOrder(["square"] * 64)
    orders = [np.concatenate(epoch(order, number, seed=seed)).tolist() for seed in (0, 1) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_buckets_are_mixed_over_an_epoch():
    buckets = ["wide"] * 64 + ["tall"] * 64
    kinds = [buckets[batch[0]] for batch in epoch(BucketOrder(buckets), 0)]
    assert sum(one != other for one, other in pairwise(kinds)) > 5  # once, were they in turn


def test_an_example_without_a_bucket_is_never_drawn():
    order = BucketOrder(["wide", None, "wide", None])
    assert set(np.concatenate(epoch(order, 0)).tolist()) == {0, 2}
    assert list(order.replacements(2)) == [2, 0]


@pytest.mark.parametrize("buckets", [[], [None, None]])
def test_no_examples_are_no_order(buckets):
    with pytest.raises(ValueError, match=f"none of {len(buckets)} examples"):
        BucketOrder(buckets)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_together_are_the_whole_batch(parts):
    order = BucketOrder(BUCKETS)
    for step in range(8):
        read = [
            read_part(order, lambda _, index: BUCKETS[index], Draws.of_step(3, step, 6 // parts, part, parts))
            for part in range(parts)
        ]
        indices = [index for part in read for index, _ in part]
        assert indices == order.batch(3, step, 6).tolist()


def test_one_that_cannot_be_read_is_replaced_by_the_next_of_its_bucket():
    order = BucketOrder(BUCKETS)
    damaged = {0, 6, 8, 9}

    def attempt(place, index):
        return None if index in damaged else BUCKETS[index]

    for step in range(12):
        whole = order.batch(3, step, 4)
        read = read_part(order, attempt, Draws.of_step(3, step, 4))
        replaced = {0: 1, 6: 1, 8: 10, 9: 10}
        assert [index for index, _ in read] == [replaced.get(int(index), int(index)) for index in whole]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_bucket_of_which_nothing_can_be_read_gives_its_place_to_the_next_batch(parts):
    order = BucketOrder(BUCKETS)

    def attempt(place, index):
        return None if BUCKETS[index] == "square" else BUCKETS[index]

    for step in range(12):
        later = next(later for later in range(step, 99) if BUCKETS[order.batch(3, later, 4)[0]] != "square")
        read = [read_part(order, attempt, Draws.of_step(3, step, 4 // parts, part, parts)) for part in range(parts)]
        assert [index for part in read for index, _ in part] == order.batch(3, later, 4).tolist()


def test_nothing_that_can_be_read_is_one_clear_error():
    with pytest.raises(ValueError, match="none of 20 examples can be read"):
        read_part(BucketOrder(BUCKETS), lambda place, index: None, Draws.of_step(0, 0, 2))
