"""A ControlNet's second stage with tiny real networks: its start, its derivative, who learns, and resuming."""

from dataclasses import replace

import pytest
import torch
from tiny_control import controlled_data, open_control
from tiny_training import CONFIG, DISTILLATION, DISTILLATION_LOOP, tiny_data, tiny_teacher

from sana_sprint.training.control_distillation import ControlDistillation
from sana_sprint.training.distillation import Distillation, guided_velocity
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import use_training_kernels
from sana_sprint.training.loop import train
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.trigflow.bridge import trigflow_velocity
from sana_sprint.trigflow.consistency import velocity_and_derivative

# Two blocks, of which the ControlNet has one.
SETTINGS = replace(DISTILLATION, matching_weight=1.0)


def distilled(seed: int = 3) -> SanaTransformer2DModel:
    """A transformer that stands for one that was distilled."""
    torch.manual_seed(seed)
    return SanaTransformer2DModel(**CONFIG)


def distillation(settings=SETTINGS, is_open: bool = True, data=None, **config) -> ControlDistillation:
    teacher = tiny_teacher(**config)
    control = open_control(teacher) if is_open else SanaControlNetModel.from_transformer(teacher, 1)
    torch.manual_seed(1)
    return ControlDistillation(teacher, control, distilled(), data or controlled_data(), settings)


def learning(objective: ControlDistillation, loss: str) -> set[str]:
    """The networks that a loss gives gradients to."""
    objective.zero_grad()
    objective(Draws.of_step(0, 5, 4))[loss].backward()
    return {
        name
        for name, network in objective.named_children()
        if any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    }


def test_untrained_control_nets_leave_every_loss_of_the_student_as_it_is():
    settings = replace(DISTILLATION, matching_weight=0.0)
    controlled = distillation(settings, is_open=False, guidance_embeds=False).eval()
    torch.manual_seed(1)
    plain = Distillation(tiny_teacher(guidance_embeds=False), tiny_data(), settings, distilled()).eval()
    plain.discriminator.load_state_dict(controlled.discriminator.state_dict())
    losses, wanted = (objective(Draws.of_step(0, 5, 4)) for objective in (controlled, plain))
    assert losses.keys() == wanted.keys()
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)  # float32: a zero is added here and there
    assert losses["derivative_norm"] > 0


def test_the_teacher_is_guided_against_the_empty_caption_with_the_same_drawing():
    objective = distillation(is_open=False, guidance_embeds=False)
    batch = objective.data.batch(Draws.of_step(0, 0, 3))
    inputs = batch.clean, torch.tensor([0.2, 0.5, 0.8]), batch
    guidance = torch.tensor([1.0, 3.0, 4.5])
    with torch.no_grad():
        found = objective.guided(*inputs, guidance)
        wanted = guided_velocity(objective.teacher, *inputs, objective.data, guidance)
        opened = distillation(guidance_embeds=False)
        base, ahead, further = (opened.guided(*inputs, torch.full((3,), scale)) for scale in (0.0, 1.0, 2.0))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(further - ahead, ahead - base, rtol=1e-4, atol=1e-5)  # a straight line in the scale
    assert not torch.allclose(ahead, wanted, atol=1e-2)


@pytest.mark.parametrize("placement", ["after", "before"])
def test_the_derivative_through_an_open_control_net_is_that_of_finite_differences(placement):
    objective = distillation()
    transformer = objective.transformer.double()
    control = open_control(tiny_teacher(), seed=5, residual_placement=placement).double()
    use_training_kernels(control)
    batch = objective.data.batch(Draws.of_step(0, 0, 2))
    caption, drawing = batch.caption.double(), batch.control.double()
    scale = torch.full((2,), 0.45).double()

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        # In float64 throughout: controlled_velocity ends in float32.
        samples = control(
            latents, caption, time, drawing, encoder_attention_mask=batch.mask, guidance=scale, return_dict=False
        )[0]
        return transformer(
            latents, caption, time, scale, batch.mask, controlnet_block_samples=samples, return_dict=False
        )[0]

    def velocity(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return trigflow_velocity(network, sample, angle, sigma_data=1.0)

    generator = torch.Generator().manual_seed(2)
    sample, direction = torch.randn(2, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    angle = torch.tensor([0.4, 1.2], dtype=torch.float64)
    _, derivative = velocity_and_derivative(velocity, sample, angle, direction)
    step = 1e-4  # larger ones meet a kink of linear attention; the features of time are in float32, and blur the rest
    with torch.no_grad():
        ahead = velocity(sample + step * direction, angle + step)
        behind = velocity(sample - step * direction, angle - step)
    factor = (torch.cos(angle) * torch.sin(angle)).view(2, 1, 1, 1)
    torch.testing.assert_close(derivative, factor * (ahead - behind) / (2 * step), rtol=0, atol=3e-4)


def test_who_learns_from_which_loss():
    objective = distillation()
    with torch.no_grad():
        objective.fake_score.controlnet_blocks[0].bias += 0.1  # or it equals the teacher, and matching has no gradient
    assert learning(objective, "consistency") == {"student", "log_variance"}
    assert learning(objective, "adversarial") == {"student"}
    assert learning(objective, "matching") == {"student"}
    assert learning(objective, "discriminator") == {"discriminator"}
    assert learning(objective, "fake_score") == {"fake_score"}


def test_the_discriminator_sees_with_the_teachers_control_net():
    settings = replace(SETTINGS, consistency_weight=0.0, matching_weight=0.0)
    objective = distillation(settings).eval()
    before = objective(Draws.of_step(0, 0, 4))["discriminator"]
    with torch.no_grad():
        objective.teacher_control.controlnet_blocks[0].weight *= -1
    assert objective(Draws.of_step(0, 0, 4))["discriminator"] != before


def test_a_control_net_without_guidance_gets_an_embedding_that_adds_nothing():
    objective = distillation(guidance_embeds=False)
    assert objective.student.config.guidance_embeds
    assert not objective.teacher_control.config.guidance_embeds
    batch = objective.data.batch(Draws.of_step(0, 0, 3))
    arguments = {"timestep": torch.tensor([0.2, 0.5, 0.8]), "controlnet_cond": batch.control, "return_dict": False}
    inputs = batch.clean, batch.caption
    with torch.no_grad():
        (wanted,) = objective.teacher_control(*inputs, **arguments)
        (found,) = objective.student.eval()(*inputs, guidance=torch.tensor([0.1, 0.4, 0.9]), **arguments)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_run_moves_the_students_control_net_alone_and_goes_on_where_it_stopped(tmp_path):
    def run():
        objective = distillation()
        frozen = {name: value.clone() for name, value in objective.state_dict().items()}
        average = train(objective, DISTILLATION_LOOP, tmp_path, "control", torch.device("cpu"))
        return objective, frozen, average.state_dict()

    objective, before, whole = run()
    kept = ("teacher.", "teacher_control.", "transformer.")
    after = objective.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name.startswith(kept))
    assert not torch.equal(after["student.input_block.weight"], before["student.input_block.weight"])
    assert isinstance(objective.averaged(), SanaControlNetModel)
    (tmp_path / f"state-{DISTILLATION_LOOP.steps:06d}.pt").unlink()  # as if it had been killed after an earlier one
    assert all(torch.equal(value, whole[name]) for name, value in run()[2].items())
