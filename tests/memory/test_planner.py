"""Which arrangement a budget gets, and what is said about it."""

import pytest

from sana_sprint.memory.planner import ARRANGEMENTS, Arrangement, Budget, all_plans, best_plan
from sana_sprint.memory.stages import Networks, Workload

GIB = 2**30


@pytest.mark.parametrize(
    ("vram", "expected"),
    [
        (24, Arrangement(16, "resident")),
        (12, Arrangement(16, "resident")),
        (8, Arrangement(16, "encoder on host")),
        (6, Arrangement(16, "encoder on host")),
        (4, Arrangement(8, "encoder on host")),
        (2.5, Arrangement(4, "encoder on host")),
    ],
)
def test_a_card_gets_the_best_that_fits(sprint, vram, expected):
    assert best_plan(all_plans(sprint, Budget(int(vram * GIB)))).arrangement == expected


def test_a_machine_with_little_memory_keeps_the_weights_on_the_card(sprint):
    plans = all_plans(sprint, Budget(8 * GIB, host=4 * GIB))
    assert best_plan(plans).arrangement == Arrangement(8, "resident")
    assert {plan.arrangement.placement for plan in plans if plan.fits} == {"resident"}


def test_without_a_card_everything_is_in_the_machines_memory(sprint):
    plans = all_plans(sprint, Budget(None, 8 * 10**9))
    assert [plan.arrangement for plan in plans] == [one for one in ARRANGEMENTS if one.placement == "resident"]
    assert best_plan(plans).arrangement == Arrangement(8, "resident")


def test_more_bits_and_what_moves_nothing_come_first():
    order = list(ARRANGEMENTS)
    assert order[0] == Arrangement(16, "resident")
    for placement in ("resident", "encoder on host", "model offload"):
        bits = [one.bits for one in order if one.placement == placement]
        assert bits == sorted(bits, reverse=True)


def test_a_decode_that_does_not_fit_gets_the_largest_tiles_that_do(sprint):
    large = Networks(sprint.configs, Workload(height=1536, width=1536))
    whole = all_plans(large, Budget(None))[0]
    tiled = all_plans(large, Budget(None, whole.peak - 10**6))[0]
    smaller = all_plans(large, Budget(None, tiled.peak - 10**6))[0]
    assert (whole.arrangement.tile, tiled.arrangement.tile, smaller.arrangement.tile) == (None, 1024, 768)
    assert tiled.fits
    assert smaller.fits


def test_the_reason_names_what_was_better_and_did_not_fit(sprint):
    plan = best_plan(all_plans(sprint, Budget(8 * GIB)))
    assert plan.reason == "16-bit, resident (9.33 GB) would not fit"
    assert str(plan).startswith("16-bit, encoder on host: at most 4.10 GB")
    assert best_plan(all_plans(sprint, Budget(24 * GIB))).reason == "the first choice, and it fits"


def test_bits_that_were_asked_for_are_kept(sprint):
    plans = all_plans(sprint, Budget(24 * GIB))
    assert best_plan(plans, bits=4).arrangement == Arrangement(4, "resident")


def test_where_nothing_fits_the_least_that_is_needed_is_said(sprint):
    with pytest.raises(ValueError, match=r"no arrangement fits 1\.07 GB: the smallest, 16-bit, group offload, takes"):
        best_plan(all_plans(sprint, Budget(GIB)))
    with pytest.raises(ValueError, match=r"the smallest, 4-bit, resident, takes \d\.\d\d GB; draw smaller"):
        best_plan(all_plans(sprint, Budget(None, GIB)))


def test_every_stage_of_every_plan_is_counted(sprint):
    plans = {str(plan.arrangement): plan for plan in all_plans(sprint, Budget(24 * GIB))}
    resident = plans["16-bit, resident"]
    assert len({stage.weights for stage in resident.stages.values()}) == 1
    offloaded = plans["16-bit, model offload"]
    assert (
        sum(stage.weights for stage in offloaded.stages.values()) == offloaded.host == resident.stages["encode"].weights
    )
    streamed = plans["16-bit, group offload"]
    assert all(streamed.stages[name].weights <= offloaded.stages[name].weights for name in streamed.stages)
    on_host = plans["16-bit, encoder on host"]
    assert on_host.host == offloaded.stages["encode"].weights
    assert on_host.stages["encode"].work == 0
