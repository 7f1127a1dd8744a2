"""Which arrangement a budget gets, and what is said about it."""

from copy import deepcopy
from dataclasses import replace

import pytest

from sana_sprint.memory.planner import (
    ARRANGEMENTS,
    PROCESS_BYTES,
    Arrangement,
    Budget,
    MemoryPlan,
    StageBytes,
    all_plans,
    best_plan,
)
from sana_sprint.memory.stages import Networks, Workload, streamed_bytes, unpacked_bytes, weight_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "bins", "drawn"),
    [((None, None), True, (1024, 1024)), ((512, 512), True, (1024, 1024)), ((512, 512), False, (512, 512)),
     ((1080, 1920), True, (768, 1344))],
)  # fmt: skip
def test_what_is_planned_for_is_the_size_that_a_call_draws(sprint, asked, bins, drawn):
    workload = Workload.of_call(sprint.configs, *asked, use_resolution_binning=bins, batch_size=2)
    assert (workload.height, workload.width, workload.batch_size) == (*drawn, 2)


def test_a_size_that_no_call_draws_is_not_planned_for(sprint, small):
    with pytest.raises(ValueError, match="must be multiples of 32, got 500x512"):
        Workload.of_call(sprint.configs, 500, 512, use_resolution_binning=False)
    with pytest.raises(ValueError, match="must be multiples of 8, got 60x64"):
        Workload.of_call(small.configs, 60, 64)


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
    assert plan.reason == "16-bit, resident (9.35 GB) would not fit"
    assert str(plan).startswith("16-bit, encoder on host: at most 4.10 GB")
    assert best_plan(all_plans(sprint, Budget(24 * GIB))).reason == "the first choice, and it fits"


def test_bits_that_were_asked_for_are_kept(sprint):
    plans = all_plans(sprint, Budget(24 * GIB))
    assert best_plan(plans, bits=4).arrangement == Arrangement(4, "resident")


def test_where_nothing_fits_the_least_that_is_needed_is_said(sprint):
    with pytest.raises(ValueError, match=r"no arrangement fits 1\.07 GB: the smallest, 16-bit, group offload, takes"):
        best_plan(all_plans(sprint, Budget(GIB)))
    with pytest.raises(ValueError, match=r"the smallest, 4-bit, resident, takes \d\.\d\d GB$"):
        best_plan(all_plans(sprint, Budget(None, GIB)))


def stored(sprint: Networks, **bits: int) -> Networks:
    """The same model with some networks quantised in the checkpoint."""
    configs = deepcopy(sprint.configs)
    for name, number in bits.items():
        setting = {"quantization_config": {"load_in_8bit": number == 8, "load_in_4bit": number == 4}}
        getattr(configs, name).update(setting)
    return Networks(configs, sprint.workload)


def arrangements(networks: Networks) -> list[str]:
    return [str(plan.arrangement) for plan in all_plans(networks, Budget(24 * GIB))]


def test_a_checkpoint_that_is_quantised_as_a_whole_keeps_its_bits(sprint):
    networks = stored(sprint, transformer=4, text_encoder=4)
    assert arrangements(networks) == ["4-bit, resident", "4-bit, encoder on host", "4-bit, model offload"]
    plans = all_plans(networks, Budget(24 * GIB))
    assert all(plan.to_quantise == () for plan in plans)
    with pytest.raises(ValueError, match="quantised to 4 bits already, asked for 8"):
        best_plan(plans, bits=8)


def test_beside_a_stored_transformer_the_bits_of_an_arrangement_are_the_text_encoders(sprint):
    networks = stored(sprint, transformer=8)
    plans = {str(plan.arrangement): plan for plan in all_plans(networks, Budget(24 * GIB))}
    assert "16-bit, group offload" not in plans
    # On the host the text encoder keeps its 16 bits, so there is one arrangement of that kind.
    assert [name for name in plans if "encoder on host" in name] == ["8-bit, encoder on host"]
    to_quantise = {name: plan.to_quantise for name, plan in plans.items() if "resident" in name}
    assert to_quantise == {
        "16-bit, resident": (),
        "8-bit, resident": ("text_encoder",),
        "4-bit, resident": ("text_encoder",),
    }
    weights = {name: plan.stages["encode"].weights for name, plan in plans.items()}
    text, image = (
        {bits: weight_bytes(part, bits) for bits in (16, 8, 4)} for part in (sprint.text_encoder, sprint.vae)
    )
    transformer = weight_bytes(sprint.transformer, 8)
    assert weights["16-bit, resident"] == text[16] + transformer + image[16]
    assert weights["4-bit, resident"] == text[4] + transformer + image[16]


def test_what_stays_as_it_is_stored_is_said(sprint):
    best = best_plan(all_plans(stored(sprint, transformer=8), Budget(24 * GIB)))
    assert best.arrangement == Arrangement(16, "resident")
    assert str(best).endswith("the first choice, and it fits; transformer stays in the checkpoint's 8 bits")


def test_networks_that_are_stored_in_different_bits_keep_them(sprint):
    networks = stored(sprint, transformer=4, text_encoder=8)
    assert arrangements(networks) == ["4-bit, resident", "4-bit, encoder on host", "4-bit, model offload"]
    resident = all_plans(networks, Budget(24 * GIB))[0]
    parts = ((sprint.text_encoder, 8), (sprint.transformer, 4), (sprint.vae, 16))
    assert resident.stages["encode"].weights == sum(weight_bytes(part, bits) for part, bits in parts)


def test_on_a_cpu_the_table_of_tokens_and_what_encodes_pictures_stay_in_their_files(sprint, from_picture):
    table, encoder = 256_000 * 2304 * 2, weight_bytes(sprint.vae.encoder)
    for networks, unread in ((sprint, table + encoder), (from_picture, table)):
        on_card, on_cpu = (all_plans(networks, budget)[0] for budget in (Budget(24 * GIB), Budget(None)))
        assert on_cpu.stages["decode"].weights == on_card.stages["decode"].weights - unread


def test_every_stage_of_every_plan_is_counted(sprint):
    plans = {str(plan.arrangement): plan for plan in all_plans(sprint, Budget(24 * GIB))}
    resident = plans["16-bit, resident"]
    assert len({stage.weights for stage in resident.stages.values()}) == 1
    offloaded = plans["16-bit, model offload"]
    weights = resident.stages["encode"].weights
    assert sum(stage.weights for stage in offloaded.stages.values()) == weights
    assert offloaded.host == weights + sprint.kept_bytes
    streamed = plans["16-bit, group offload"]
    assert all(streamed.stages[name].weights <= offloaded.stages[name].weights for name in streamed.stages)
    on_host = plans["16-bit, encoder on host"]
    assert on_host.host == offloaded.stages["encode"].weights + sprint.kept_bytes
    assert on_host.stages["encode"].work == 0


@pytest.fixture(scope="module")
def from_picture(sprint) -> Networks:
    """The same model for a call that starts from a picture."""
    return Networks(sprint.configs, replace(sprint.workload, starts_from_picture=True))


@pytest.fixture(scope="module")
def controlled(sprint) -> Networks:
    """The same model with a ControlNet of seven blocks, as NVlabs' are."""
    config = {**sprint.configs.transformer, "num_layers": 7, "_class_name": "SanaControlNetModel"}
    return Networks(replace(sprint.configs, controlnet=config), sprint.workload)


def pairs(first: Networks, second: Networks, budget: Budget) -> list[tuple[MemoryPlan, MemoryPlan]]:
    """The plans for two calls, by arrangement."""
    plans = [all_plans(networks, budget) for networks in (first, second)]
    return list(zip(*plans, strict=True))


@pytest.mark.parametrize("budget", [Budget(24 * GIB), Budget(None)], ids=["card", "CPU"])
def test_a_picture_to_start_from_adds_its_encoding_and_nothing_else(sprint, from_picture, budget):
    is_cpu = budget.device is None
    read = weight_bytes(sprint.vae.encoder) if is_cpu else 0  # which stays in its file otherwise
    for plain, other in pairs(sprint, from_picture, budget):
        stages = dict(other.stages)
        encoding = stages.pop("encode picture")
        assert next(iter(other.stages)) == "encode picture"
        before = {name: replace(stage, weights=stage.weights + read) for name, stage in plain.stages.items()}
        assert (stages, other.host, other.arrangement) == (before, plain.host, plain.arrangement)
        # The autoencoder's weights are where they are for the decode, and so is what the text encoder has kept.
        kept = sprint.kept_bytes if other.arrangement.placement == "resident" else 0
        assert encoding == StageBytes(before["decode"].weights, from_picture.encode_picture_bytes() + kept)
        assert other.peak == max(plain.peak + read, encoding.peak + (PROCESS_BYTES if is_cpu else 0))


def test_an_encoding_that_does_not_fit_is_tiled_as_a_decode_is(from_picture):
    large = Networks(from_picture.configs, replace(from_picture.workload, height=1536, width=1536))
    whole = all_plans(large, Budget(None))[0]
    assert whole.stages["encode picture"].peak > whole.stages["decode"].peak
    # Too little for the encoding alone.
    tiled = all_plans(large, Budget(None, whole.peak - 1))[0]
    assert (tiled.arrangement.tile, tiled.fits) == (1024, True)
    assert tiled.stages["encode picture"].work == large.encode_picture_bytes(1024) + large.kept_bytes


def test_a_controlnet_is_wherever_the_transformer_is(sprint, controlled):
    for plain, other in pairs(sprint, controlled, Budget(24 * GIB)):
        arrangement = other.arrangement
        added = weight_bytes(controlled.controlnet, arrangement.bits)
        more = {name: other.stages[name].weights - stage.weights for name, stage in plain.stages.items()}
        if arrangement.placement in ("resident", "encoder on host"):
            assert set(more.values()) == {added}
            assert other.host == plain.host
        elif arrangement.placement == "model offload":
            assert more == {"encode": 0, "denoise": added, "decode": 0}
            assert other.host - plain.host == added
        else:
            blocks = max(streamed_bytes(one) for one in (controlled.controlnet, controlled.transformer))
            assert other.stages["denoise"].weights == blocks < added
            assert other.host - plain.host == added
        work = other.stages["denoise"].work - plain.stages["denoise"].work
        assert work == controlled.denoise_bytes - sprint.denoise_bytes
        assert set(other.to_quantise) == ({*plain.to_quantise, "controlnet"} if arrangement.bits != 16 else set())


def test_with_a_controlnet_a_card_gets_what_fits_beside_it(sprint, controlled):
    plain, other = (best_plan(all_plans(networks, Budget(int(4.6 * GIB)))) for networks in (sprint, controlled))
    assert plain.arrangement == Arrangement(16, "encoder on host")
    assert other.arrangement == Arrangement(8, "encoder on host")


def test_a_controlnet_that_is_quantised_keeps_its_bits(sprint, controlled):
    plans = {str(plan.arrangement): plan for plan in all_plans(stored(controlled, controlnet=4), Budget(24 * GIB))}
    assert "16-bit, group offload" not in plans
    assert plans["8-bit, resident"].to_quantise == ("text_encoder", "transformer")
    best = best_plan(list(plans.values()))
    assert str(best).endswith("controlnet stays in the checkpoint's 4 bits")
    parts = (sprint.text_encoder, sprint.transformer, sprint.vae)
    assert best.arrangement == Arrangement(16, "resident")
    assert best.stages["encode"].weights == sum(map(weight_bytes, parts)) + weight_bytes(controlled.controlnet, 4)
    unpacked = unpacked_bytes(controlled.controlnet, 4)
    assert best.stages["denoise"].work == controlled.denoise_bytes + unpacked + controlled.kept_bytes
