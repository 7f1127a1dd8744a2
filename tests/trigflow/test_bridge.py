"""The bridge from flow matching to TrigFlow: against upstream's form, known answers, and both clocks side by side."""

import math
from itertools import pairwise

import pytest
import torch

from sana_sprint.trigflow.bridge import angle_of_flow_time, flow_time, trigflow_velocity
from sana_sprint.trigflow.path import add_noise, predict_clean

SIGMA_DATA = 0.5
MU, S = 0.7, 0.4  # the data of the tests with a known answer: N(MU, S^2), in unit scale


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def curved_network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Any smooth function of latents and time will do where two ways of calling a network are compared."""
    time = time.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
    return torch.sin(3 * latents + time) + latents.roll(1, -1) * torch.cos(5 * time)


def gaussian_velocity(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """E[z - x | (1 - time) x + time z] for x ~ N(MU, S^2), z ~ N(0, 1): a linear regression."""
    tau = time.view(-1, 1)
    slope = (tau - (1 - tau) * S**2) / ((1 - tau) ** 2 * S**2 + tau**2)
    return -MU + slope * (latents - (1 - tau) * MU)


def six_line_form(network, sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """The published formulas of flow time, scaled input and velocity, term by term."""
    tau = torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))
    wide = tau.view(-1, *[1] * (sample.ndim - 1))
    m = torch.sqrt(wide**2 + (1 - wide) ** 2)
    x_flow = sample / SIGMA_DATA * m
    v = network(x_flow, tau)
    return SIGMA_DATA * ((1 - 2 * wide) * x_flow + (1 - 2 * wide + 2 * wide**2) * v) / m


# float32: about ten roundings of numbers up to 8; float64: the same, 5e8 times finer.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_the_closed_form_is_the_published_one(dtype, atol):
    angles = torch.linspace(0, 1.57080, 33, dtype=dtype)
    sample = SIGMA_DATA * draw(33, 4, 6, 6, dtype=dtype)
    ours = trigflow_velocity(curved_network, sample, angles, SIGMA_DATA)
    torch.testing.assert_close(ours, six_line_form(curved_network, sample, angles), atol=atol, rtol=0)


def test_a_scalar_angle_is_one_angle_for_every_sample():
    sample, angle = draw(3, 4), torch.tensor(0.9, dtype=torch.float64)
    seen = []
    scalar = trigflow_velocity(
        lambda x, time: (seen.append(time.shape), gaussian_velocity(x, time))[1], sample, angle, 0.5
    )
    assert seen == [(3,)]
    batch = trigflow_velocity(gaussian_velocity, sample, angle.expand(3), SIGMA_DATA)
    torch.testing.assert_close(scalar, batch, atol=1e-14, rtol=0)


def test_an_angle_on_the_host_serves_latents_elsewhere_and_nothing_is_read_from_there():
    """On the meta device no value can be read, so a velocity has read none."""
    seen = []
    sample = torch.zeros(3, 4, device="meta")
    velocity = trigflow_velocity(lambda x, time: (seen.append(time), x)[1], sample, torch.tensor(0.9), SIGMA_DATA)
    assert velocity.device.type == seen[0].device.type == "meta"
    assert seen[0].shape == (3,)


def test_a_bfloat16_network_rounds_its_own_input_and_output_and_nothing_else():
    handed = []

    def network(latents, time):
        handed.append((latents.dtype, time.dtype))
        return curved_network(latents.bfloat16(), time)

    sample, angle = SIGMA_DATA * draw(2, 8, dtype=torch.float32), torch.tensor([0.3, 1.4])
    velocity = trigflow_velocity(network, sample, angle, SIGMA_DATA)
    assert handed == [(torch.float32, torch.float32)]
    assert velocity.dtype == torch.float32
    # The two forms hand over inputs that differ in the last float32 bit. Should that flip a bfloat16 rounding, the
    # results would be a bfloat16 step apart (2^-8 of numbers up to 3); on these samples it flips none.
    torch.testing.assert_close(velocity, six_line_form(network, sample, angle), atol=2e-6, rtol=0)


def test_flow_time_and_angle_are_inverse():
    angles = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    times = flow_time(angles)
    assert times[0] == 0
    assert abs(times[-1] - 1) < 1e-15  # cos(pi/2) is 6e-17 in float64
    torch.testing.assert_close(angle_of_flow_time(times), angles, atol=1e-15, rtol=0)  # one rounding each way


def test_gaussian_data_get_their_exact_trigflow_velocity():
    angles = torch.linspace(0.01, 1.55, 50, dtype=torch.float64)
    x = draw(50, 7)
    c, s = torch.cos(angles).view(-1, 1), torch.sin(angles).view(-1, 1)
    # E[c z - s x | c x + s z], the regression written down in the angle without any flow time.
    exact = -s * MU + c * s * (1 - S**2) / (c**2 * S**2 + s**2) * (x - c * MU)
    ours = trigflow_velocity(gaussian_velocity, SIGMA_DATA * x, angles, SIGMA_DATA)
    torch.testing.assert_close(ours, SIGMA_DATA * exact, atol=1e-13, rtol=0)  # float64, numbers up to 10


def test_fifty_steps_by_either_clock_draw_the_same_sample():
    """A straight step in flow time is a rotation in the angle, so at the same 50 points they agree for any network."""
    z = draw(4, 6)
    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    flow = z
    for now, then in pairwise(times):
        flow = flow + (then - now) * curved_network(flow, now.expand(4))

    angles = angle_of_flow_time(times)
    x = SIGMA_DATA * z
    for now, then in pairwise(angles):
        velocity = trigflow_velocity(curved_network, x, now, SIGMA_DATA)
        quarter_turn_ahead = predict_clean(velocity, -x, now)  # the noise: cos(t) velocity + sin(t) x
        x = add_noise(predict_clean(x, velocity, now), quarter_turn_ahead, then)
    # Roundings of 50 steps, each step magnifying earlier ones by at most 1 + 4/50.
    torch.testing.assert_close(x / SIGMA_DATA, flow, atol=1e-12, rtol=0)


def test_euler_in_the_angle_reaches_the_exact_sample_of_gaussian_data():
    z = draw(200, 1)
    angles = torch.linspace(math.pi / 2, 0, 51, dtype=torch.float64)
    x = SIGMA_DATA * z
    for now, then in pairwise(angles):
        x = x + (then - now) * trigflow_velocity(gaussian_velocity, x, now, SIGMA_DATA)
    # The flow carries z to MU + S z. Euler's method is of first order: 0.021 off with 50 steps, 0.011 with 100.
    torch.testing.assert_close(x / SIGMA_DATA, MU + S * z, atol=0.03, rtol=0)
