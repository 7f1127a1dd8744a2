"""Tensors to whether anything made of them will be differentiated, and so must not be overwritten or cut short."""

import torch


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients are recorded, and some of `tensors` take part; None is the bias that a layer has not."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
