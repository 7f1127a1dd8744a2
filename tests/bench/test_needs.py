"""Bytes counted beforehand beside those of a run, and that more pictures need more."""

import pytest
import torch

from sana_sprint.bench.needs import Needs
from sana_sprint.memory.stages import Workload
from sana_sprint.memory.tracker import PeakBytes

ALL = ("text_encoder", "transformer", "vae")
ONE, TWO = (Workload(height=512, width=512, batch_size=batch, dtype=torch.float32) for batch in (1, 2))


# Our norms go piece by piece on a CPU, and in one on the meta device.
@pytest.mark.parametrize(
    ("name", "side", "tolerance"), [("step", "theirs", 0.02), ("decode", "theirs", 0.02), ("decode", "ours", 0.1)]
)
@torch.no_grad()
def test_what_a_case_needs_is_what_it_then_takes(configs, make_twins, case, name, side, tolerance):
    chosen = case(name)
    pair = make_twins().pair(chosen.networks)
    weights = sum(p.nbytes for network in chosen.networks for p in getattr(pair.ours, network).parameters())
    run = getattr(chosen.build(pair, ONE, 0), side)
    with PeakBytes() as count:
        run(0)
    needed = getattr(Needs(configs, ONE), f"of_{side}")(chosen.networks)
    assert needed == pytest.approx(weights + count.peak, rel=tolerance)


def test_a_picture_needs_all_weights_and_the_largest_stage_but_no_sum_of_stages(configs):
    needs = Needs(configs, ONE)
    single = [needs.of_theirs([name]) for name in ALL]
    assert max(single) < needs.of_theirs(ALL) < sum(single)


def test_diffusers_decode_needs_more_than_ours(configs):
    needs = Needs(configs, ONE)
    assert needs.of_theirs(["vae"]) > needs.of_ours(["vae"])


def test_more_pictures_need_more(configs):
    assert Needs(configs, ONE).of_ours(ALL) < Needs(configs, TWO).of_ours(ALL)


def test_float8_needs_our_own_transformer_on_both_sides_and_nothing_else(configs):
    plain, rounded = Needs(configs, ONE), Needs(configs, ONE, float8=True)
    more = rounded.of_ours(ALL) - plain.of_ours(ALL)
    assert more == rounded.of_theirs(["transformer"]) - plain.of_theirs(["transformer"])
    assert 0 < more < plain.of_ours(["transformer"])
    assert rounded.of_ours(["vae"]) == plain.of_ours(["vae"])
