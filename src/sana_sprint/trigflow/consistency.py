"""A student's velocity, and how it changes along the teacher's path, to the loss that makes one step enough.

Continuous-time consistency (sCM) of Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency
Models" (arXiv 2410.11081), as SANA-Sprint uses it (arXiv 2503.09641): the clean latents cos(t) x_t - sin(t) F(x_t, t)
that the student F predicts shall not change while x_t moves with the teacher's velocity dx_t/dt.

Latents are (B, ...) of unit variance, their noise too; t (B,) is an angle in radians.
"""

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad

from sana_sprint.trigflow.path import cosine_and_sine

# A TrigFlow network: noisy latents (B, ...) and angles (B,) to a velocity (B, ...).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Keeps a tangent of no length from being blown up; sCM's c, and SANA-Sprint's.
TANGENT_NORM_OFFSET = 0.1


def draw_angles(normal: torch.Tensor, mean: float, std: float, sigma_data: float) -> torch.Tensor:
    """Angles (B,) from standard normal numbers (B,): arctan(exp(mean + std n) / sigma_data)."""
    return torch.atan(torch.exp(mean + std * normal) / sigma_data)


def velocity_and_derivative(
    student: Velocity,
    sample: torch.Tensor,
    angle: torch.Tensor,
    teacher_velocity: torch.Tensor,
    in_one_pass: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """F(x_t, t) with its graph, and cos(t) sin(t) dF/dt along the teacher's path without one: one pass gives both.

    Forward-mode differentiation, so that the derivative is exact. The factor is inside, for dF/dt alone grows without
    bound towards the ends of the path.

    A student with gradient checkpointing needs two passes: what is run again in the backward pass is not differentiated
    forwards there. The derivative's pass keeps nothing then.
    """
    if not in_one_pass:
        with torch.no_grad():
            _, derivative = velocity_and_derivative(student, sample, angle, teacher_velocity)
        return student(sample, angle), derivative
    c, s = cosine_and_sine(angle, sample)
    with forward_ad.dual_level():
        result = student(
            forward_ad.make_dual(sample, c * s * teacher_velocity),
            forward_ad.make_dual(angle, (c * s).view(-1)),
        )
        velocity, derivative = forward_ad.unpack_dual(result)
        # A view of a dual tensor must not leave the level; a network that depends on neither has no derivative.
        velocity = velocity.clone()
        derivative = torch.zeros_like(velocity) if derivative is None else derivative.clone()
    return velocity, derivative.detach()


def warmup_share(step: int, warmup_steps: int) -> float:
    """How much of the tangent's second part counts in a step, from 0: it grows evenly to 1 in `warmup_steps` steps."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def consistency_tangent(
    sample: torch.Tensor,
    angle: torch.Tensor,
    velocity: torch.Tensor,
    teacher_velocity: torch.Tensor,
    derivative: torch.Tensor,
    warmup: float,
) -> torch.Tensor:
    """Where the student's velocity should move, of length below 1 over each sample's axes.

    cos(t) times the derivative along the path of the clean latents that it predicts, normalised:
    -cos^2(t) (F - dx/dt) - r cos(t) sin(t) (x_t + dF/dt).

    Args:
        sample, angle: x_t (B, ...) and t (B,).
        velocity, teacher_velocity: F and dx/dt, (B, ...).
        derivative: cos(t) sin(t) dF/dt, (B, ...), as `velocity_and_derivative` returns it.
        warmup: r, from 0 to 1. The second part, of which the student's own derivative is the unstable one, is brought
            in slowly; with r = 0 the student learns the teacher's velocity.
    """
    c, s = cosine_and_sine(angle, sample)
    tangent = -(c**2) * (velocity - teacher_velocity) - warmup * (c * s * sample + derivative)
    length = tangent.flatten(1).norm(dim=1).view(c.shape)
    return (tangent / (length + TANGENT_NORM_OFFSET)).detach()


def tangent_error(velocity: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """|F - F_stopped - g|^2 (B,): in value that of the tangent g, and its gradient moves F along g."""
    return (velocity - velocity.detach() - tangent).flatten(1).square().sum(1)


def consistency_loss(
    velocity: torch.Tensor, tangent: torch.Tensor, angle: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """The loss (B,) of each sample: `tangent_error` / tan(t), weighed by a variance that is learned with it.

    `log_variance` (B,) learns the size of the rest, so that all angles count alike: e^-v loss + v. Squares are summed,
    where sCM takes their mean: it differs by a constant that v would have to learn first, and starts near 0 so.
    """
    error = tangent_error(velocity, tangent)
    return error / torch.tan(angle) * torch.exp(-log_variance) + log_variance
