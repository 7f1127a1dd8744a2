"""Distillation with tiny real networks: the student's start, its derivative, who learns from what, and that it does."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_training import DISTILLATION as SETTINGS
from tiny_training import OPTIMISER, tiny_data, tiny_teacher

from sana_sprint.training.datasets.source import LatentBatch
from sana_sprint.training.distillation import AngleDistribution, Distillation, DistillationSettings, student_of
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowData, predict_velocity, use_training_kernels
from sana_sprint.training.loop import train
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.trigflow.bridge import trigflow_velocity
from sana_sprint.trigflow.consistency import velocity_and_derivative
from sana_sprint.trigflow.path import predict_clean


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distillation(settings: DistillationSettings = SETTINGS, **config: Any) -> Distillation:
    torch.manual_seed(1)
    return Distillation(tiny_teacher(**config), tiny_data(), settings)


def gradients(objective: Distillation, loss: str, size: int = 4) -> dict[str, bool]:
    """Which of the networks a loss gives gradients to."""
    objective.zero_grad()
    objective(Draws.of_step(0, 5, size))[loss].backward()
    return {
        name: any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
        for name, network in objective.named_children()
    }


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_the_student_starts_equal_to_its_teacher_at_every_guidance_scale(guidance_embeds):
    original = tiny_teacher(guidance_embeds=guidance_embeds)
    student = student_of(original).eval()
    inputs = (draw(3, 4, 4, 4), torch.tensor([0.1, 0.5, 0.9]), draw(3, 5, 8, seed=1), torch.ones(3, 5))
    scales = torch.tensor([1.0, 4.5, 9.0])
    expected = predict_velocity(original, *inputs, scales if guidance_embeds else None)
    torch.testing.assert_close(predict_velocity(student, *inputs, scales), expected, rtol=0, atol=0)
    assert student.config.guidance_embeds
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_student_and_fake_score_start_from_the_networks_that_are_given():
    teacher, *given = (tiny_teacher() for _ in range(3))
    for number, network in enumerate(given):
        torch.nn.init.constant_(network.proj_out.bias, 1.0 + number)
    settings = replace(SETTINGS, consistency_weight=0.0, adversarial_weight=0.0, matching_weight=1.0)
    objective = Distillation(teacher, tiny_data(), settings, *given)
    assert objective.student.proj_out.bias.unique().tolist() == [1.0]
    assert objective.fake_score.proj_out.bias.unique().tolist() == [2.0]


def test_a_new_guidance_embedding_learns_with_both_its_layers():
    objective = distillation(guidance_embeds=False)
    embedder = objective.student.time_embed.guidance_embedder
    before = [parameter.clone() for parameter in (embedder.linear_1.weight, embedder.linear_2.weight)]
    optimiser = torch.optim.SGD(objective.student.parameters(), lr=0.1)
    for step in range(2):
        objective(Draws.of_step(0, step, 4))["loss"].backward()
        optimiser.step()
    assert not torch.equal(before[1], embedder.linear_2.weight)
    assert not torch.equal(before[0], embedder.linear_1.weight)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_the_derivative_of_the_whole_student_is_that_of_finite_differences(qk_norm):
    student = tiny_teacher(qk_norm=qk_norm).double()
    use_training_kernels(student)
    caption, mask, guidance = draw(2, 5, 8, dtype=torch.float64), torch.ones(2, 5), torch.full((2,), 4.5).double()
    mask[1, 3:] = 0

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        # In float64 throughout: predict_velocity ends in float32.
        scale = guidance * student.config.guidance_embeds_scale
        return student(latents, caption, time, scale, mask, return_dict=False)[0]

    def velocity(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return trigflow_velocity(network, sample, angle, sigma_data=1.0)

    sample, angle = draw(2, 4, 4, 4, dtype=torch.float64), torch.tensor([0.4, 1.2], dtype=torch.float64)
    direction = draw(2, 4, 4, 4, seed=2, dtype=torch.float64)
    _, derivative = velocity_and_derivative(velocity, sample, angle, direction)
    step = 1e-3  # the features of time are in float32, and so the differences cannot be finer
    with torch.no_grad():
        ahead = velocity(sample + step * direction, angle + step)
        behind = velocity(sample - step * direction, angle - step)
    factor = (torch.cos(angle) * torch.sin(angle)).view(2, 1, 1, 1)
    torch.testing.assert_close(derivative, factor * (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)


def test_who_learns_from_which_loss():
    objective = distillation()
    nobody = {"teacher": False, "student": False, "log_variance": False, "discriminator": False}
    assert gradients(objective, "consistency") == nobody | {"student": True, "log_variance": True}
    assert gradients(objective, "adversarial") == nobody | {"student": True}
    assert gradients(objective, "discriminator") == nobody | {"discriminator": True}


def test_a_fakes_score_that_is_the_teachers_moves_no_student_and_who_learns_from_matching():
    objective = distillation(replace(SETTINGS, consistency_weight=0.0, adversarial_weight=0.0, matching_weight=1.0))
    nobody = {"teacher": False, "student": False, "fake_score": False}
    assert gradients(objective, "matching") == nobody
    assert gradients(objective, "fake_score") == nobody | {"fake_score": True}
    with torch.no_grad():
        objective.fake_score.proj_out.bias += 0.1
    assert gradients(objective, "matching") == nobody | {"student": True}


def test_more_noisings_estimate_the_same_matching_with_less_noise():
    settings = replace(SETTINGS, consistency_weight=0.0, adversarial_weight=0.0, matching_weight=1.0)
    batch, guidance = tiny_data().batch(Draws.of_step(0, 0, 4)), torch.full((4,), 4.5)

    def estimates(times: int) -> torch.Tensor:
        objective = distillation(replace(settings, matching_noisings=times))
        with torch.no_grad():
            objective.fake_score.proj_out.bias += 0.1
            drawn = [Draws.of_step(1, step, 4) for step in range(20)]
            losses = [objective._matching(draws, batch, batch.clean, guidance) for draws in drawn]
        return torch.stack([each["matching"] for each in losses])

    few, many = estimates(1), estimates(16)
    # Four standard deviations of a mean of twenty.
    torch.testing.assert_close(few.mean(), many.mean(), rtol=0, atol=4 * few.std().item() / 20**0.5)
    # A quarter is what sixteen independent ones have.
    assert many.std() < 0.5 * few.std()


def test_examples_that_do_not_start_from_noise_can_start_from_what_the_student_draws():
    """With all of them simulated, the data's latents matter no more; with none, they do."""
    settings = replace(SETTINGS, consistency_weight=0.0, adversarial_weight=0.0, matching_weight=1.0)

    def losses(share: float, shift: float) -> dict[str, torch.Tensor]:
        objective = distillation(replace(settings, simulated_share=share))
        with torch.no_grad():
            objective.fake_score.proj_out.bias += 0.1
        source = objective.data
        objective.data = FlowData(source.latents + shift, source.captions, source.masks)
        return objective(Draws.of_step(0, 0, 4))

    assert losses(1.0, 0.0) == losses(1.0, 1.0)
    assert losses(0.0, 0.0) != losses(0.0, 1.0)
    objective = distillation(replace(settings, simulated_share=1.0))
    assert gradients(objective, "fake_score") == {"teacher": False, "student": False, "fake_score": True}


def test_every_trained_parameter_is_in_one_group_and_the_discriminator_has_its_own_settings():
    own = replace(OPTIMISER, learning_rate=3e-4, betas=(0.0, 0.9), clip_norm=7.0)
    groups = {group.name: group for group in distillation(replace(SETTINGS, discriminator=own)).groups()}
    assert list(groups) == ["student", "log_variance", "discriminator"]
    assert groups["discriminator"].settings == own
    assert groups["student"].settings == OPTIMISER
    groups = {
        group.name: group for group in distillation(replace(SETTINGS, matching_weight=1.0, fake_score=own)).groups()
    }
    assert groups["fake_score"].settings == own


class OtherWrongCaptions(FlowData):
    """The same data with other misaligned captions."""

    def batch(self, draws: Draws, caption_dropout: float = 0.0, misaligned: bool = False) -> LatentBatch:
        batch = super().batch(draws, caption_dropout, misaligned)
        assert batch.wrong_caption is not None
        return replace(batch, wrong_caption=batch.wrong_caption + 1)


@pytest.mark.parametrize("size", [1, 3])
def test_misaligned_pairs_work_for_every_batch_size_and_teach_the_discriminator_alone(size):
    objective = distillation().eval()  # or the spectral norms would move on between the two
    losses = objective(Draws.of_step(0, 0, size))
    source = objective.data
    objective.data = OtherWrongCaptions(source.latents, source.captions, source.masks)
    others = objective(Draws.of_step(0, 0, size))
    assert others["adversarial"] == losses["adversarial"]
    assert others["discriminator"] != losses["discriminator"]


@pytest.mark.parametrize(
    ("change", "networks", "losses"),
    [
        (
            {"adversarial_weight": 0.0},
            {"teacher", "student", "log_variance"},
            {"loss", "consistency", "derivative_norm"},
        ),
        (
            {"consistency_weight": 0.0},
            {"teacher", "student", "discriminator"},
            {"loss", "adversarial", "discriminator"},
        ),
        (
            {"consistency_weight": 0.0, "adversarial_weight": 0.0, "matching_weight": 1.0},
            {"teacher", "student", "fake_score"},
            {"loss", "matching", "fake_score"},
        ),
        (
            {"consistency_weight": 0.0, "adversarial_weight": 0.0, "reconstruction_weight": 1.0},
            {"teacher", "student"},
            {"loss", "reconstruction"},
        ),
    ],
)
def test_any_loss_alone(change, networks, losses):
    objective = distillation(replace(SETTINGS, **change))
    assert {name for name, _ in objective.named_children()} == networks
    assert set(objective(Draws.of_step(0, 0, 4))) == losses


def test_the_latents_of_the_data_are_what_reconstruction_wants_of_the_student_alone():
    weights = {"consistency_weight": 0.0, "adversarial_weight": 0.0, "reconstruction_weight": 1.0}
    # With next to no noise, a velocity of any size leaves the latents where they were.
    still = replace(SETTINGS, max_time_share=0.0, student_angles=AngleDistribution(mean=-9, std=0), **weights)
    assert distillation(still)(Draws.of_step(0, 0, 4))["reconstruction"] < 1e-6
    # The student's own are not the data's.
    assert distillation(replace(still, simulated_share=1.0))(Draws.of_step(0, 0, 4))["reconstruction"] > 0.1
    objective = distillation(replace(SETTINGS, **weights))
    assert objective(Draws.of_step(0, 0, 4))["reconstruction"] > 0.1
    assert gradients(objective, "reconstruction") == {"teacher": False, "student": True}


def test_the_gradient_penalty_is_added():
    plain = distillation()(Draws.of_step(0, 0, 4))["discriminator"]
    assert distillation(replace(SETTINGS, gradient_penalty=1.0))(Draws.of_step(0, 0, 4))["discriminator"] > plain


def test_two_parts_of_a_batch_have_the_loss_of_the_whole():
    objective = distillation(replace(SETTINGS, adversarial_weight=0.0))
    whole = objective(Draws.of_step(0, 3, 8))["consistency"]
    parts = [objective(Draws.of_step(0, 3, 4, part, 2))["consistency"] for part in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"consistency_weight": 0.0, "adversarial_weight": 0.0}, "nothing to learn"),
        ({"max_time_share": 1.0}, r"max_time_share must lie in \[0, 1\)"),
        ({"tangent_warmup_steps": -10}, "tangent_warmup_steps must be 0 or more, got -10"),
        ({"simulated_share": 1.5}, r"simulated_share must lie in \[0, 1\]"),
        ({"head_blocks": (1, 0)}, "head_blocks must ascend"),
        ({"matching_noisings": 0}, "matching_noisings must be 1 or more, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize("blocks", [(), (0, 2)])
def test_heads_need_blocks_that_the_teacher_has(blocks):
    with pytest.raises(ValueError, match="some of the teacher's 2 blocks"):
        distillation(replace(SETTINGS, head_blocks=blocks))


def test_one_step_of_the_student_comes_to_where_many_of_the_teacher_lead(tmp_path):
    """The end of the teacher's own flow is known, whatever it was trained on: fifty small steps go there."""
    original = tiny_teacher()
    use_training_kernels(original)
    settings = replace(SETTINGS, adversarial_weight=0.0, guidance_scales=(4.5,), max_time_share=0.0)
    source = tiny_data(4)
    objective = Distillation(original, source, settings)
    loop = LoopSettings(steps=150, batch_size=32, precision="fp32", ema_decay=0.9, seed=1)
    caption, mask = source.captions[:4].float(), source.masks[:4]
    noise, guidance = draw(4, 4, 4, 4, seed=5), torch.full((4,), 4.5)

    @torch.no_grad()
    def ends(network: SanaTransformer2DModel, steps: int) -> torch.Tensor:
        angles = torch.linspace(torch.pi / 2, 0, steps + 1)
        sample = noise
        for angle, following in pairwise(angles):
            velocity = trigflow_velocity(
                lambda latents, time: predict_velocity(network, latents, time, caption, mask, guidance),
                sample, angle, sigma_data=1.0,
            )  # fmt: skip
            sample = predict_clean(sample, velocity, angle - following)
        return sample

    goal = ends(original, 50)
    before = (ends(original, 1) - goal).norm()
    student = train(objective, loop, tmp_path, "student", torch.device("cpu"))
    assert (ends(student, 1) - goal).norm() < 0.5 * before
