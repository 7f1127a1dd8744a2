"""Clean latents, noise and an angle to noisy latents and their velocity, and from those back to clean latents.

The TrigFlow path of Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models"
(arXiv 2410.11081): x_t = cos(t) x + sin(t) z, a quarter turn from the data x to the noise z.

t is an angle in radians, 0 clean, pi/2 noise: a scalar tensor, or (B,) with one angle for each sample. Latents are
(B, ...) and in any one scale, data and noise alike. Results are float32, or float64 for float64 latents: near the ends
of the path one of the two coefficients is small, and half precision would lose what it multiplies.
"""

import torch


def widened(latents: torch.Tensor) -> torch.Tensor:
    """The same latents in float32, or in float64 if that is what they are."""
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def cosine_and_sine(angle: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos(t) and sin(t), shaped to multiply `latents` (B, ...), in the latents' dtype.

    A scalar angle may stay on the CPU while the latents are on another device: it multiplies them without a transfer.

    Raises:
        ValueError: if `angle` is neither a scalar nor (B,).
    """
    if angle.ndim > 1 or (angle.ndim == 1 and angle.shape[0] != latents.shape[0]):
        raise ValueError(
            f"angle must be a scalar or hold one value for each of the {latents.shape[0]} samples, "
            f"got shape {tuple(angle.shape)}"
        )
    if angle.ndim == 1:
        angle = angle.view(-1, *[1] * (latents.ndim - 1))  # B -> B 1 1 1
    return torch.cos(angle).to(latents.dtype), torch.sin(angle).to(latents.dtype)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Noisy latents x_t at angle t: cos(t) x + sin(t) z."""
    clean, noise = widened(clean), widened(noise)
    c, s = cosine_and_sine(angle, clean)
    return c * clean + s * noise


def velocity_target(clean: torch.Tensor, noise: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """The derivative of `add_noise` by the angle, which a TrigFlow network learns: cos(t) z - sin(t) x."""
    clean, noise = widened(clean), widened(noise)
    c, s = cosine_and_sine(angle, clean)
    return c * noise - s * clean


def predict_clean(sample: torch.Tensor, velocity: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """The clean latents that a noisy sample and its velocity point to: cos(t) x_t - sin(t) velocity.

    Exact for a true velocity: the rotation that `add_noise` and `velocity_target` make, turned back.
    """
    sample, velocity = widened(sample), widened(velocity)
    c, s = cosine_and_sine(angle, sample)
    return c * sample - s * velocity
