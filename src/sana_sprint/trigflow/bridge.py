"""A flow-matching network, noisy latents and an angle to the velocity that a TrigFlow network would have returned.

The change of clock and scale of SANA-Sprint's training-free transformation (arXiv 2503.09641), in closed form. Flow
matching walks the straight line (1 - time) x + time z, so the latents cos(t) x + sin(t) z lie on it once divided by
cos(t) + sin(t), at time sin(t) / (cos(t) + sin(t)). This is the one place that knows sigma_data, the standard
deviation of the latents in TrigFlow: it is divided out before the network and multiplied back after it.

B batch; t is an angle in radians, time is flow matching's, 0 clean and 1 noise.
"""

from typing import Protocol

import torch

from sana_sprint.trigflow.path import cosine_and_sine, widened


class FlowNetwork(Protocol):
    """A flow-matching network: latents (B, ...) of unit scale and time (B,) in [0, 1] to the velocity noise - data."""

    def __call__(self, latents: torch.Tensor, time: torch.Tensor, /) -> torch.Tensor: ...


def flow_time(angle: torch.Tensor) -> torch.Tensor:
    """The time in [0, 1] at which flow matching has the signal-to-noise ratio of this angle."""
    c, s = torch.cos(angle), torch.sin(angle)
    return s / (s + c)


def angle_of_flow_time(time: torch.Tensor) -> torch.Tensor:
    """The inverse of `flow_time`: the angle in radians for a time in [0, 1]."""
    return torch.atan2(time, 1 - time)


def trigflow_velocity(
    network: FlowNetwork, sample: torch.Tensor, angle: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """The TrigFlow velocity of a flow-matching network, in the scale of the sample.

    The network is handed float32 latents and time (float64 for a float64 sample). A network of another dtype casts
    them itself, so that its rounding touches its own input and output and never the state.

    Args:
        network: Called once, with latents in the sample's shape and one time for each sample.
        sample: Noisy latents (B, ...) with standard deviation `sigma_data`.
        angle: In radians: (B,) on the device of the sample, or a scalar there or on the CPU, whose cosine and sine are
            then computed there.
        sigma_data: Standard deviation of the clean latents.

    Returns:
        The velocity, float32 (float64 for a float64 sample): what `predict_clean` takes with the same sample.

    Raises:
        ValueError: if `angle` is neither a scalar nor (B,).
    """
    x = widened(sample) / sigma_data
    c, s = cosine_and_sine(angle, x)
    time = flow_time(angle).to(x.dtype)
    if time.device != x.device:
        time = x.new_full((), time.item())  # and not copied to the device, which would wait for its work
    v = network(x / (c + s), time.expand(x.shape[0]))
    return sigma_data * (((c - s) * x + v.to(x.dtype)) / (c + s))
