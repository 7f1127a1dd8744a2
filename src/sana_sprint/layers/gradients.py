"""Tensors to whether autograd will record what is made of them: if so, nothing is overwritten, kept or cut short."""

from collections.abc import Iterable

import torch


def needs_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether gradients are recorded and some of `tensors` take part, of which none is looked at if they are not.

    None stands for an absent bias.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
