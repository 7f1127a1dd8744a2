"""The cases: equal results on both sides, and prompts that are new where they ought to be."""

import pytest
import torch

from sana_sprint.bench.agreement import compare
from sana_sprint.bench.cases import CASES, GROUPS, prompts
from sana_sprint.bench.measure import count
from sana_sprint.bench.twins import load_tokenizer
from sana_sprint.memory.stages import Workload

CPU = torch.device("cpu")


@pytest.mark.parametrize("chosen", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_both_sides_of_a_case_give_the_same_result(make_twins, chosen):
    runs = chosen.build(
        make_twins().pair(chosen.networks), Workload(height=64, width=64, batch_size=3, dtype=torch.float32), 0
    )
    for number in (0, 1):
        ours, theirs = runs.numbers(runs.ours(number)), runs.numbers(runs.theirs(number))
        assert ours.std() > 0.1
        # Float32, sums over 500 tokens, four steps and a decoder at most.
        assert compare(ours, theirs).relative_error < 1e-5


@torch.no_grad()
def test_a_new_prompt_is_read_in_every_round_and_the_same_one_is_not(make_twins, case):
    operations = {}
    for name in ("text, new prompt", "text, same prompt"):
        runs = case(name).build(make_twins().pair(["text_encoder"]), Workload(height=64, width=64), 0)
        runs.ours(0)
        operations[name] = [count(run, CPU, is_compiled=False).operations for run in (runs.ours, runs.theirs)]
    new, same = operations.values()
    assert 0 < new[0] < new[1] / 10  # the instruction is read once
    assert same == [0, new[1]]


@torch.no_grad()
def test_a_picture_does_not_know_its_prompt_from_another_case(make_twins, case):
    twins, chosen = make_twins(), case("picture, 1 step")
    operations = []
    for _ in range(2):
        run = chosen.build(twins.pair(chosen.networks), Workload(height=64, width=64, dtype=torch.float32), 0).ours
        operations += [count(run, CPU, is_compiled=False).operations for _ in range(2)]  # of the same prompt twice
    assert operations[0] == operations[2] > operations[1] == operations[3]


def test_prompts_are_new_for_every_number_and_as_long_as_before():
    tokenizer = load_tokenizer()
    batches = [prompts(3, number) for number in range(200)]
    assert len({text for batch in batches for text in batch}) == 600
    lengths = {tuple(len(tokenizer.encode(text)) for text in batch) for batch in batches}
    assert len(lengths) == 1
    first, second, third = lengths.pop()
    assert second < first == third


def test_groups_are_those_of_the_cases_and_only_the_transformer_depends_on_the_model():
    assert GROUPS == ("text", "step", "decode", "picture")
    assert {case.group for case in CASES if case.has_model} == {"step", "picture"}
    assert {case.group for case in CASES if not case.has_size} == {"text"}
