"""Scales of a ControlNet by angle, and a copy that learns to need none; with tiny real networks."""

from dataclasses import replace

import pytest
import torch
from tiny_control import controlled_data, open_control
from tiny_training import CONFIG, tiny_teacher

from sana_sprint.training.control_rescaling import ControlRescaling, RescalingSettings, ScaleByAngle
from sana_sprint.training.distillation import AngleDistribution
from sana_sprint.training.draws import Draws
from sana_sprint.training.loop import train
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel

SCALE = ScaleByAngle(later_scale=1.5, later_up_to=1.3, first_scale=0.75, first_from=1.55)
SETTINGS = RescalingSettings(
    optimiser=OptimiserSettings(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0),
    scale=SCALE,
    later_angles=AngleDistribution(mean=0.5, std=1.0),
    use_muon=False,
    compile=False,
)
# A squared error of what is the same but for the rounding of float32, whose values are about 1.
ROUNDING = 1e-9
LOOP = LoopSettings(steps=60, batch_size=4, precision="fp32", ema_decay=0.5, log_every=10)


def rescaling(scale: ScaleByAngle = SCALE) -> ControlRescaling:
    torch.manual_seed(3)
    transformer = SanaTransformer2DModel(**CONFIG)
    return ControlRescaling(
        transformer, open_control(tiny_teacher()), controlled_data(), replace(SETTINGS, scale=scale)
    )


def losses(objective: ControlRescaling) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(loss) for name, loss in objective(Draws.of_step(7, 0, 4)).items()}


def test_a_scale_is_level_on_both_sides_and_a_line_between():
    found = SCALE.at(torch.tensor([0.0, 1.3, 1.425, 1.55, 1.5708]))
    torch.testing.assert_close(found, torch.tensor([1.5, 1.5, 1.125, 0.75, 0.75]))


def test_angles_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match=r"later_up_to must lie below first_from, got 1\.5 and 1\.3"):
        replace(SCALE, later_up_to=1.5, first_from=1.3)


@pytest.mark.parametrize(
    ("later_scale", "first_scale", "different"),
    [(1.0, 1.0, set()), (1.5, 1.0, {"later"}), (1.0, 0.5, {"first"}), (1.5, 0.75, {"first", "later"})],
)
def test_at_first_only_those_steps_differ_whose_scale_is_not_one(later_scale, first_scale, different):
    # Beyond all angles of later steps but the largest, and below all of first ones.
    scale = ScaleByAngle(later_scale=later_scale, later_up_to=1.5, first_scale=first_scale, first_from=1.54)
    found = losses(rescaling(scale).eval())
    assert found["loss"] == pytest.approx(found["first"] + found["later"])
    assert {name for name in ("first", "later") if found[name] > ROUNDING} == different


def test_the_copy_learns_to_draw_so_without_scales_and_nothing_else_moves(tmp_path):
    # The same scale everywhere, which ways out of one block can learn.
    objective = rescaling(replace(SCALE, later_scale=1.5, first_scale=1.5))
    frozen = {
        name: weight.clone() for name, weight in objective.state_dict().items() if not name.startswith("student.")
    }
    before = losses(objective)
    train(objective, LOOP, tmp_path, "rescaling", torch.device("cpu"))
    after = losses(objective)
    assert after["first"] < 0.5 * before["first"]
    assert after["later"] < 0.5 * before["later"]
    for name, weight in objective.state_dict().items():
        if name in frozen:
            torch.testing.assert_close(weight, frozen[name], rtol=0, atol=0)


def test_a_copy_that_draws_as_wanted_has_no_loss():
    # Where the scale is the same at all angles, its ways out times the scale are the answer.
    objective = rescaling(replace(SCALE, later_scale=1.5, first_scale=1.5)).eval()
    assert losses(objective)["loss"] > 1000 * ROUNDING
    with torch.no_grad():
        for way_out in objective.student.controlnet_blocks:
            way_out.weight *= 1.5
            way_out.bias *= 1.5
    assert losses(objective)["loss"] < ROUNDING


def test_later_steps_begin_at_what_the_first_one_drew_and_never_at_the_data():
    before = losses(rescaling().eval())
    other = rescaling().eval()
    other.data = replace(other.data, latents=torch.zeros_like(other.data.latents))
    assert losses(other) == before
    # At another first scale the first step draws something else, from which both go on.
    moved = losses(rescaling(replace(SCALE, first_scale=0.2)).eval())
    assert moved["later"] != pytest.approx(before["later"], rel=1e-3)
