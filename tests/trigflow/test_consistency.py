"""The consistency objective: where the answer is known, and its derivative against finite differences."""

import math

import pytest
import torch

from sana_sprint.trigflow.consistency import (
    TANGENT_NORM_OFFSET,
    consistency_loss,
    consistency_tangent,
    draw_angles,
    velocity_and_derivative,
    warmup_share,
)
from sana_sprint.trigflow.path import cosine_and_sine, predict_clean

S = 0.6  # standard deviation of the data of the test with a known answer, N(0, S^2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    c, s = cosine_and_sine(angle, sample)
    return (c * S) ** 2 + s**2


def exact_teacher(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """dx/dt of the probability flow of N(0, S^2): half the logarithmic derivative of the variance, times x."""
    c, s = cosine_and_sine(angle, sample)
    return c * s * (1 - S**2) / variance(sample, angle) * sample


def exact_student(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """The velocity that leads in one step to where the probability flow ends, x S / sqrt(variance)."""
    c, s = cosine_and_sine(angle, sample)
    return (c - S * torch.rsqrt(variance(sample, angle))) / s * sample


def network(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    _, s = cosine_and_sine(angle, sample)
    return torch.tanh(2 * sample) * s + sample.roll(1, -1) ** 2


def tangent_of(student, sample: torch.Tensor, angle: torch.Tensor, warmup: float) -> torch.Tensor:
    teacher = exact_teacher(sample, angle)
    velocity, derivative = velocity_and_derivative(student, sample, angle, teacher)
    return consistency_tangent(sample, angle, velocity, teacher, derivative, warmup)


def test_angles_follow_the_log_normal_distribution():
    angles = draw_angles(torch.tensor([-1.0, 0.0, 1.0]), mean=0.2, std=1.6, sigma_data=0.5)
    torch.testing.assert_close(torch.tan(angles) * 0.5, torch.exp(torch.tensor([-1.4, 0.2, 1.8])))


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_value_gradient_and_derivative_in_one_pass_or_two(in_one_pass):
    sample, angle, teacher = draw(5, 3, 4), torch.linspace(0.1, 1.5, 5, dtype=torch.float64), draw(5, 3, 4, seed=1)
    sample.requires_grad_()
    velocity, derivative = velocity_and_derivative(network, sample, angle, teacher, in_one_pass)
    torch.testing.assert_close(velocity, network(sample, angle), rtol=0, atol=0)
    assert not derivative.requires_grad
    (gradient,) = torch.autograd.grad(velocity.square().sum(), sample)
    (expected,) = torch.autograd.grad(network(sample, angle).square().sum(), sample)
    torch.testing.assert_close(gradient, expected)

    step = 1e-6
    ahead = network(sample + step * teacher, angle + step)
    behind = network(sample - step * teacher, angle - step)
    c, s = cosine_and_sine(angle, sample)
    torch.testing.assert_close(derivative, (c * s * (ahead - behind) / (2 * step)).detach(), atol=1e-8, rtol=1e-7)


def test_a_network_that_ignores_sample_and_angle_has_no_derivative():
    constant = torch.ones(2, 3, dtype=torch.float64)
    velocity, derivative = velocity_and_derivative(
        lambda sample, angle: constant, draw(2, 3), torch.ones(2, dtype=torch.float64), draw(2, 3, seed=1)
    )
    assert torch.equal(velocity, constant)
    assert not derivative.any()


def test_the_exact_student_of_gaussian_data_is_left_alone_and_others_are_not():
    angle = torch.linspace(0.05, 1.55, 20, dtype=torch.float64)
    sample = draw(20, 6)
    assert tangent_of(exact_student, sample, angle, warmup=1).abs().max() < 1e-9
    assert tangent_of(exact_teacher, sample, angle, warmup=1).flatten(1).norm(dim=1).min() > 1e-3


def test_the_tangent_moves_a_student_towards_the_exact_one():
    angle = torch.linspace(0.3, 1.4, 12, dtype=torch.float64)
    sample = draw(12, 6)

    def off(share: float):
        return lambda sample, angle: torch.lerp(exact_student(sample, angle), exact_teacher(sample, angle), share)

    before = off(0.5)(sample, angle)
    after = before + 1e-3 * tangent_of(off(0.5), sample, angle, warmup=1)
    end = exact_student(sample, angle)
    distance = [(velocity - end).flatten(1).norm(dim=1) for velocity in (before, after)]
    assert (distance[1] < distance[0]).all()


def test_a_warmup_grows_evenly_and_one_of_no_steps_is_over_at_once():
    assert [warmup_share(step, 4) for step in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert warmup_share(0, 0) == 1


def test_without_warmup_the_student_is_drawn_to_its_teacher():
    sample, angle = draw(4, 5), torch.tensor([0.2, 0.7, 1.1, 1.5], dtype=torch.float64)
    tangent = tangent_of(network, sample, angle, warmup=0)
    gap = exact_teacher(sample, angle) - network(sample, angle)
    cosine = torch.cosine_similarity(tangent, gap, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_tangents_are_shorter_than_one_however_long_they_were():
    sample, angle, velocity = draw(3, 4), torch.tensor([0.1, 0.8, 1.4], dtype=torch.float64), draw(3, 4, seed=1)
    for scale in (1e-3, 1.0, 1e6):
        tangent = consistency_tangent(sample, angle, velocity, scale * velocity, 0 * velocity, warmup=0.0)
        raw = (torch.cos(angle) ** 2)[:, None] * (scale - 1) * velocity
        length = raw.norm(dim=1)
        torch.testing.assert_close(tangent.norm(dim=1), length / (length + TANGENT_NORM_OFFSET))


def test_the_gradient_of_the_loss_is_the_tangent_and_the_best_log_variance_that_of_the_error():
    velocity, tangent = draw(3, 2, 2).requires_grad_(), draw(3, 2, 2, seed=1)
    angle = torch.tensor([0.3, 0.9, 1.4], dtype=torch.float64)
    error = tangent.flatten(1).square().sum(1) / torch.tan(angle)
    log_variance = error.log().requires_grad_()
    loss = consistency_loss(velocity, tangent, angle, log_variance)
    torch.testing.assert_close(loss, 1 + error.log())
    by_velocity, by_variance = torch.autograd.grad(loss.sum(), [velocity, log_variance])
    weight = (2 / error / torch.tan(angle)).view(3, 1, 1)
    torch.testing.assert_close(by_velocity, -weight * tangent)
    torch.testing.assert_close(by_variance, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("angle", [math.pi / 2, 1.57080])
def test_pure_noise_has_next_to_no_loss(angle):
    sample, velocity = draw(2, 3), draw(2, 3, seed=1)
    angles = torch.full((2,), angle, dtype=torch.float64)
    tangent = consistency_tangent(sample, angles, velocity, sample, velocity * 1e-5, warmup=1.0)
    loss = consistency_loss(velocity, tangent, angles, torch.zeros(2, dtype=torch.float64))
    assert loss.abs().max() < 1e-5


def test_one_step_of_the_exact_student_ends_where_the_flow_does():
    z = draw(4, 3)
    angle = torch.full((4,), math.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(predict_clean(z, exact_student(z, angle), angle), S * z)
