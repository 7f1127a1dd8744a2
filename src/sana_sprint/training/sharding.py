"""Tensors of which every process holds a part to whole ones, and back."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any) -> Any:
    """The same value with its sharded tensors, in dictionaries and lists too, whole on the CPU.

    Every process must call this alike, for each holds a part.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return value


def part_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is: this process's part of it if that one is sharded, on the same device."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
