"""Distribution matching: its gradient, and where it ends for Gaussian latents, whose scores are known."""

import math

import pytest
import torch

from sana_sprint.training.matching import matching_loss
from sana_sprint.trigflow.path import add_noise


def test_the_gradient_is_the_difference_of_the_predictions_by_the_distance_to_the_teachers():
    clean = torch.tensor([[1.0, 2.0], [5.0, 5.0]], requires_grad=True)
    by_teacher, by_fake = torch.tensor([[0.0, 4.0], [5.0, 5.5]]), torch.tensor([[0.5, 4.0], [6.0, 5.0]])
    matching_loss(clean, by_teacher, by_fake).backward()
    distance = torch.tensor([[1.5], [0.25]])
    torch.testing.assert_close(clean.grad, (by_fake - by_teacher) / distance / clean.numel())


def test_predictions_that_agree_move_nothing():
    clean = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    matching_loss(clean, clean.detach(), clean.detach()).backward()
    assert not clean.grad.any()


def posterior_mean(noisy: torch.Tensor, angle: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """The best prediction of latents N(mean, std^2) from noisy ones."""
    c, s = torch.cos(angle).view(-1, 1), torch.sin(angle).view(-1, 1)
    return mean + c * std**2 / (c**2 * std**2 + s**2) * (noisy - c * mean)


@pytest.mark.parametrize(("mean", "std"), [(2.0, 0.3), (-1.0, 1.5)])
def test_a_gaussian_student_becomes_its_gaussian_teacher(mean, std):
    generator = torch.Generator().manual_seed(1)
    shift, scale = torch.zeros(1, requires_grad=True), torch.full((1,), 0.8, requires_grad=True)
    optimiser = torch.optim.Adam([shift, scale], lr=0.03)
    for _ in range(600):
        clean = shift + scale * torch.randn(64, 16, generator=generator)
        angle = math.pi / 2 * torch.rand(64, generator=generator)
        noisy = add_noise(clean.detach(), torch.randn(64, 16, generator=generator), angle)
        by_teacher = posterior_mean(noisy, angle, mean, std)
        by_fake = posterior_mean(noisy, angle, shift.item(), scale.item())
        optimiser.zero_grad()
        matching_loss(clean, by_teacher, by_fake).backward()
        optimiser.step()
    assert shift.item() == pytest.approx(mean, abs=0.1)
    assert abs(scale.item()) == pytest.approx(std, abs=0.1)
