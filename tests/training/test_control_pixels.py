"""A ControlNet that learns by decoded pictures; with tiny real networks."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_control import controlled_data, open_control
from tiny_training import CONFIG, tiny_teacher

from sana_sprint.training.control_pixels import PixelObjective, PixelSettings
from sana_sprint.training.distillation import AngleDistribution
from sana_sprint.training.draws import Draws
from sana_sprint.training.loop import train
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel

SETTINGS = PixelSettings(
    optimiser=OptimiserSettings(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
    later_angles=AngleDistribution(mean=0.1, std=0.6),
    use_muon=False,
    compile=False,
)
LOOP = LoopSettings(steps=60, batch_size=4, precision="fp32", ema_decay=0.5, log_every=10)


@pytest.fixture
def pixels(tiny_pipeline_parts) -> Callable[..., PixelObjective]:
    """Objectives with networks of their own; keywords change the settings."""

    def make(**settings: Any) -> PixelObjective:
        torch.manual_seed(3)
        transformer, vae = SanaTransformer2DModel(**CONFIG), copy.deepcopy(tiny_pipeline_parts["vae"])
        control = open_control(tiny_teacher())
        return PixelObjective(transformer, control, vae, controlled_data(), replace(SETTINGS, **settings))

    return make


def losses(objective: PixelObjective) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(loss) for name, loss in objective(Draws.of_step(7, 0, 4)).items()}


def test_the_first_loss_is_how_far_a_step_from_noise_is_from_the_decoded_data(pixels):
    objective = pixels().eval()
    draws = Draws.of_step(7, 0, 4)
    batch, guidance = objective.data.batch(draws), draws.choice(SETTINGS.guidance_scales)
    noise, share = draws.normal(batch.clean.shape[1:]), draws.uniform()
    angle = 1.54 + (math.pi / 2 - 1.54) * share
    pictures = []
    with torch.no_grad():
        drawn = one_step(objective, batch, noise, angle, guidance)
        for latents in (drawn, batch.clean):
            pictures.append(objective.vae.decode(latents / objective.vae.config.scaling_factor).sample)
    wanted = (pictures[0] - pictures[1]).abs().mean().item()
    assert losses(objective)["first"] == pytest.approx(wanted, rel=1e-5)  # float32 in another order


def one_step(objective, batch, noise, angle, guidance) -> torch.Tensor:
    """The clean latents, by networks called as a pipeline calls them: flow time s / (c + s), latents / (c + s)."""
    c, s = (part.view(-1, 1, 1, 1) for part in (angle.cos(), angle.sin()))
    inputs = {
        "encoder_hidden_states": batch.caption,
        "timestep": (s / (c + s)).flatten(),
        "encoder_attention_mask": batch.mask,
        "guidance": guidance * objective.transformer.config.guidance_embeds_scale,
        "return_dict": False,
    }
    latents = noise / (c + s)
    residuals = objective.student(latents, controlnet_cond=batch.control, **inputs)[0]
    flow = objective.transformer(latents, controlnet_block_samples=residuals, **inputs)[0]
    # The flow's velocity is noise minus data.
    return latents - inputs["timestep"].view(-1, 1, 1, 1) * flow


def test_both_losses_count_alike_and_teach(pixels):
    objective = pixels()
    found = objective(Draws.of_step(7, 0, 4))
    torch.testing.assert_close(found["loss"], found["first"] + found["later"])
    way_out = objective.student.controlnet_blocks[0].weight
    loss, first, later = (
        torch.autograd.grad(found[name], way_out, retain_graph=True)[0] for name in ("loss", "first", "later")
    )
    assert first.any()
    assert later.any()
    torch.testing.assert_close(loss, first + later)


def test_what_the_decoder_does_not_show_does_not_count(pixels):
    objective = pixels().eval()
    objective.vae.decoder.in_shortcut = False
    with torch.no_grad():
        objective.vae.decoder.conv_in.weight[:, 0] = 0
    before, data = losses(objective), objective.data
    for channel, counts in ((0, False), (1, True)):
        latents = data.latents.clone()
        latents[:, channel] += 1
        objective.data = replace(data, latents=latents)
        after = losses(objective)
        assert [after[name] != before[name] for name in ("first", "later")] == [counts, counts]


def test_later_steps_begin_at_what_the_first_one_drew_and_do_not_teach_it(pixels):
    # At an angle of 1e-5, arctan(2 exp(-12)), a step changes nothing to three digits, and its gradient is as small.
    objective = pixels(later_angles=AngleDistribution(mean=-12.0, std=0.1))
    found = objective(Draws.of_step(7, 0, 4))
    assert found["first"] > 0
    torch.testing.assert_close(found["later"], found["first"], rtol=1e-3, atol=0)
    way_out = objective.student.controlnet_blocks[0].weight
    first, later = (
        torch.autograd.grad(found[name], way_out, retain_graph=True)[0].norm() for name in ("first", "later")
    )
    assert 0 < later < 1e-3 * first
    assert losses(pixels().eval())["later"] != pytest.approx(found["first"].item(), rel=1e-3)


def test_the_copy_learns_both_steps_and_nothing_else_moves(pixels, tmp_path):
    objective = pixels()
    # One picture for all, for noise cannot be learned; one block's way into a transformer reaches a part of it only.
    objective.data = replace(objective.data, latents=torch.zeros_like(objective.data.latents))
    frozen = {
        name: weight.clone() for name, weight in objective.state_dict().items() if not name.startswith("student.")
    }
    before = losses(objective)
    train(objective, LOOP, tmp_path, "pixels", torch.device("cpu"))
    after = losses(objective)
    assert after["first"] < 0.9 * before["first"]
    assert after["later"] < 0.9 * before["later"]
    for name, weight in objective.state_dict().items():
        if name in frozen:
            torch.testing.assert_close(weight, frozen[name], rtol=0, atol=0)
