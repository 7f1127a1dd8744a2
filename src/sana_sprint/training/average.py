"""A network in training to the exponential moving average of its weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sana_sprint.training.sharding import part_like, whole

M = TypeVar("M", bound=nn.Module)


class MovingAverage(Generic[M]):
    """The average of a network's weights, as a network of its own that is never trained.

    It is made before the network is sharded; `follow` then makes it average shards, and `gather` makes it whole.
    """

    def __init__(self, network: M) -> None:
        self.network = network
        self.result = copy.deepcopy(network).eval().requires_grad_(False)
        self.weights: list[torch.Tensor] = list(self.result.parameters())

    def follow(self) -> None:
        """Average what each process holds of the network, from now on."""
        pairs = zip(self.result.parameters(), self.network.parameters(), strict=True)
        self.weights = [
            part_like(weight, parameter) if isinstance(parameter, DTensor) else weight for weight, parameter in pairs
        ]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move towards the network's present weights."""
        torch._foreach_lerp_(self.weights, list(self.network.parameters()), 1 - decay)

    @torch.no_grad()
    def gather(self) -> M:
        """The average, whole, with the network's present buffers; every process must call this."""
        for averaged, weight in zip(self.result.parameters(), self.weights, strict=True):
            if isinstance(weight, DTensor):
                averaged.copy_(whole(weight))
        for kept, current in zip(self.result.buffers(), self.network.buffers(), strict=True):
            kept.copy_(current)
        return self.result

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.result.load_state_dict(state)
        self.follow()
