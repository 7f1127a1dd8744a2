"""Counting bytes: what is made and held counts, what was there before or is gone does not."""

import torch
from torch import nn

from sana_sprint.memory.tracker import PeakBytes

KILO = 1024  # bytes of 256 float32 numbers


def numbers() -> torch.Tensor:
    return torch.ones(256)


def test_what_is_held_at_once_adds_up():
    with PeakBytes() as count:
        first = numbers()
        second = first + 1
        del first
        third = second * 2
    assert count.peak == 2 * KILO
    assert third.sum() == 1024


def test_what_is_held_in_the_end_is_known_until_it_is_freed():
    with PeakBytes() as count:
        kept = numbers()
        kept * 2
    assert (count.peak, count.held) == (2 * KILO, KILO)
    del kept
    assert count.held == 0


def test_views_and_changes_in_place_take_nothing():
    with PeakBytes() as count:
        values = numbers()
        values.view(16, 16).t()[2:].add_(1)
    assert count.peak == KILO


def test_weights_and_inputs_that_were_there_before_do_not_count_nor_do_views_of_them():
    layer, x = nn.Linear(256, 256, bias=False), numbers()
    with torch.no_grad(), PeakBytes() as count:
        assert layer.weight.t().shape == (256, 256)
        layer(x)
    assert count.peak == KILO


def test_a_place_that_was_freed_and_taken_again_counts_once():
    with PeakBytes() as count:
        for _ in range(50):
            numbers()
    assert count.peak == KILO


def test_the_meta_device_gives_the_same_count_as_the_cpu():
    def peak_on(device: str) -> int:
        with torch.device(device):
            network, x = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)), torch.ones(8, 64)
        with torch.no_grad(), PeakBytes() as count:
            network(x)
        return count.peak

    assert peak_on("meta") == peak_on("cpu") == 2 * 8 * 512 * 4
