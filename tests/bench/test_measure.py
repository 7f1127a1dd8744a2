"""Order of rounds, counted operations and bytes, and failures, on runs whose answers are known."""

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.bench.agreement import BOUNDS
from sana_sprint.bench.cases import Runs
from sana_sprint.bench.measure import count, measure
from sana_sprint.memory.stages import Workload

CPU = torch.device("cpu")


def test_rounds_alternate_and_ask_both_for_the_same_which_is_new():
    calls: list[tuple[str, int]] = []

    def run(name):
        return lambda number: calls.append((name, number)) or torch.ones(2)

    measured = measure(Runs(run("ours"), run("theirs")), 3, CPU)
    timed = calls[-6:]
    assert [name for name, _ in timed] == ["ours", "theirs"] * 3
    numbers = [number for _, number in timed]
    assert numbers[0::2] == numbers[1::2]
    assert len(set(numbers)) == 3
    assert not set(numbers) & {number for _, number in calls[:-6]}
    assert {name for name, _ in calls[:-6]} == {"ours", "theirs"}
    assert len(measured.ours.seconds) == len(measured.theirs.seconds) == 3


def test_operations_and_bytes_of_a_product_are_what_they_must_be():
    left, right = torch.ones(10, 20), torch.ones(20, 30)
    counts = count(lambda number: left @ right, CPU, is_compiled=False)
    assert counts == (2 * 10 * 20 * 30, 10 * 30 * 4)


def test_operations_of_fused_attention_are_counted_on_a_cpu():
    query = torch.ones(1, 2, 16, 8)
    counts = count(lambda number: F.scaled_dot_product_attention(query, query, query), CPU, is_compiled=False)
    assert counts.operations == 2 * (2 * 2 * 16 * 16 * 8)  # scores and sums, of two heads


def test_compiled_code_is_counted_as_it_was_written_and_its_memory_is_not_known():
    product = torch.compile(lambda left, right: left @ right, backend="eager")
    left = torch.ones(10, 20)
    assert count(lambda number: product(left, left.T), CPU, is_compiled=True) == (2 * 10 * 20 * 10, None)


def test_what_keeps_diffusers_from_a_case_is_reported_and_ours_is_measured_all_the_same():
    def theirs(number):
        raise RuntimeError("no\nsuch kernel")

    measured = measure(Runs(lambda number: torch.ones(2), theirs), 2, CPU)
    assert measured.failure == "RuntimeError: no such kernel"
    assert (measured.theirs, measured.agreement) == (None, None)
    assert len(measured.ours.seconds) == 2


def test_a_failure_of_ours_is_an_error():
    def ours(number):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        measure(Runs(ours, lambda number: torch.ones(2)), 1, CPU)


def test_the_worst_round_decides_on_the_agreement():
    last = []

    def ours(number):
        last.append(number)
        return torch.ones(2) * (1.5 if len(last) == 4 else 1)  # the second of three rounds, after two that prepare

    measured = measure(Runs(ours, lambda number: torch.ones(2)), 3, CPU)
    assert measured.agreement.relative_error == pytest.approx(0.5)


def test_one_altered_weight_is_noticed(make_twins, case):
    pair = make_twins().pair(["transformer"])
    layer = pair.theirs.transformer.transformer_blocks[1].attn1.to_v
    altered = layer.weight.clone()
    altered[0] += 0.1  # of one row; a new tensor, since the old one is ours as well
    layer.weight = torch.nn.Parameter(altered, requires_grad=False)
    runs = case("step").build(pair, Workload(height=64, width=64, dtype=torch.float32), 0)
    assert not measure(runs, 1, CPU).agreement.holds(BOUNDS[torch.float32])
