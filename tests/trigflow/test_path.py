"""The path of an angle: its identities, and what it does to dtypes and shapes."""

import math

import pytest
import torch

from sana_sprint.trigflow.path import add_noise, predict_clean, velocity_target

EXACT = {"atol": 1e-14, "rtol": 0}  # float64: a handful of roundings of numbers up to about 4


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("angle", [torch.tensor(0.7), torch.tensor([0.0, 0.7, math.pi / 2])], ids=["scalar", "batch"])
def test_the_true_velocity_of_noisy_latents_leads_back_to_the_clean_ones(angle):
    clean, noise, angle = draw(3, 2, 4, 5), draw(3, 2, 4, 5, seed=1), angle.double()
    noisy, velocity = add_noise(clean, noise, angle), velocity_target(clean, noise, angle)
    torch.testing.assert_close(predict_clean(noisy, velocity, angle), clean, **EXACT)


def test_the_path_starts_at_the_data_and_ends_at_the_noise():
    clean, noise = draw(2, 3), draw(2, 3, seed=1)
    assert torch.equal(add_noise(clean, noise, torch.tensor(0.0)), clean)
    end = add_noise(clean, noise, torch.tensor(math.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(end, noise, **EXACT)


def test_the_velocity_target_is_the_derivative_of_the_path():
    clean, noise, angle = draw(2, 3), draw(2, 3, seed=1), torch.tensor(0.4, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: add_noise(clean, noise, t), (angle,), (torch.ones_like(angle),))
    torch.testing.assert_close(velocity_target(clean, noise, angle), derivative, **EXACT)


def test_each_sample_has_its_own_angle():
    clean, noise, angles = draw(3, 2, 2), draw(3, 2, 2, seed=1), torch.tensor([0.1, 0.8, 1.5])
    together = add_noise(clean, noise, angles)
    for i, angle in enumerate(angles):
        # Vectorised and scalar cosines of a float32 angle may differ in the last bit.
        torch.testing.assert_close(
            together[i : i + 1], add_noise(clean[i : i + 1], noise[i : i + 1], angle), atol=1e-6, rtol=0
        )


def test_half_precision_latents_are_widened_and_float64_is_kept():
    half, angle = draw(2, 3, dtype=torch.float32).bfloat16(), torch.tensor([0.3, 0.9])
    for function in (add_noise, velocity_target, predict_clean):
        assert function(half, half, angle).dtype == torch.float32
        assert torch.equal(function(half, half, angle), function(half.float(), half.float(), angle))
        assert function(half.double(), half.double(), angle).dtype == torch.float64
        assert function(half.float(), half.float(), angle.double()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,)])
def test_an_angle_that_fits_no_batch_is_refused(shape):
    with pytest.raises(ValueError, match=r"each of the 3 samples, got shape"):
        add_noise(draw(3, 2), draw(3, 2), torch.zeros(shape))
