"""A student's latents to where they should move, so that they are distributed as a teacher's: distribution matching.

Yin et al., "One-step Diffusion with Distribution Matching Distillation" (arXiv 2311.18828), as simplified by their
"Improved Distribution Matching Distillation" (arXiv 2405.14867). Noised to any angle, the student's latents have a
score, which a second network learns while they change (the "fake score"), and the teacher's have another. Where the two
networks predict different clean latents, the student's shall move towards the teacher's.

Clean latents are (B, ...).
"""

import torch
import torch.nn.functional as F

# Keeps latents that the teacher predicts exactly from being pushed without bound.
_LEAST_DISTANCE = 1e-3


def matching_loss(clean: torch.Tensor, by_teacher: torch.Tensor, by_fake: torch.Tensor) -> torch.Tensor:
    """The mean over the examples of a loss whose gradient is the difference of the two predictions.

    Divided by how far the teacher's prediction is from the student's latents, so that all angles count alike: at small
    ones both networks see nearly everything, and differ little.

    Args:
        clean: what the student has made, with its graph.
        by_teacher, by_fake: what teacher and fake score predict from the same, once noised.
    """
    clean, by_teacher, by_fake = clean.float(), by_teacher.detach().float(), by_fake.detach().float()
    distance = (clean.detach() - by_teacher).abs().flatten(1).mean(1).clamp_min(_LEAST_DISTANCE)
    direction = (by_fake - by_teacher) / distance.view(-1, *[1] * (clean.ndim - 1))
    return 0.5 * F.mse_loss(clean, clean.detach() - direction)
