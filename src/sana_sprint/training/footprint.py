"""An objective on the meta device to the memory that its training takes on each device, in bytes.

B batch, C channels, h w latent grid, L text tokens.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sana_sprint.training.datasets.source import LatentBatch
from sana_sprint.training.draws import Draws
from sana_sprint.training.loop import Objective
from sana_sprint.training.optimiser import LEAST_8BIT_SIZE, ParameterGroup
from sana_sprint.training.settings import LoopSettings

# bitsandbytes: a float32 scale for so many numbers of each of the two moments.
_NUMBERS_PER_SCALE = 256


@dataclass(frozen=True)
class NetworkBytes:
    """What one network takes; all but the parameters, which are a number, in bytes."""

    parameters: int
    weights: int
    gradients: int = 0
    moments: int = 0
    average: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.average


@dataclass(frozen=True)
class Footprint:
    """What training takes on a device where every process holds all of it, as with one process or DDP.

    Attributes:
        networks: by name; exact.
        examples: in a micro-step.
        activations: an estimate: what autograd keeps of the losses of a micro-step for their gradients. What
            operations work with comes on top, and one block's share where blocks are run again.
    """

    networks: dict[str, NetworkBytes]
    examples: int
    activations: int

    @property
    def total(self) -> int:
        return self.activations + sum(network.total for network in self.networks.values())


@dataclass(frozen=True)
class EmptyLatents:
    """A `LatentSource` of batches without content, of one shape, on the meta device."""

    latent_shape: tuple[int, int, int]  # C h w
    text_shape: tuple[int, int]  # L width
    device: torch.device = field(default_factory=lambda: torch.device("meta"))
    has_control: bool = False

    def batch(self, draws: Draws, caption_dropout: float = 0.0, misaligned: bool = False) -> LatentBatch:
        clean = torch.empty(draws.size, *self.latent_shape, device=self.device)
        caption, mask = self.empty_caption(draws.size)
        wrong_caption, wrong_mask = (caption, mask) if misaligned else (None, None)
        control = torch.empty_like(clean) if self.has_control else None
        return LatentBatch(clean, caption, mask, wrong_caption, wrong_mask, control)

    def empty_caption(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        caption = torch.empty(size, *self.text_shape, device=self.device)
        return caption, torch.ones(size, self.text_shape[0], dtype=torch.long, device=self.device)

    def identity(self) -> str:
        return "empty"

    def to(self, device: torch.device) -> "EmptyLatents":
        return replace(self, device=device)


class _Autocast(TorchFunctionMode):
    """Products in bfloat16, as under autocast, which the meta device does not have."""

    PRODUCTS = frozenset(
        (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS:
            args, kwargs = tree_map_only(torch.Tensor, _in_half, (args, kwargs))
        return func(*args, **kwargs)


def _in_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def _moment_bytes(group: ParameterGroup) -> int:
    """Of what the optimiser keeps: one number a weight with Muon, two with AdamW, of 8 bits each if asked for."""
    matrices = {id(matrix) for matrix in group.matrices}
    total = 0
    for parameter in group.parameters:
        count = parameter.numel()
        if id(parameter) in matrices:
            total += _bytes([parameter])
        elif group.settings.kind == "adamw_8bit" and count >= LEAST_8BIT_SIZE:
            total += 2 * (count + 4 * -(-count // _NUMBERS_PER_SCALE))
        else:
            total += 2 * _bytes([parameter])
    return total


def _kept_bytes(objective: Objective[Any], loop: LoopSettings, examples: int) -> int:
    """Of the tensors that autograd keeps of the losses, each counted once; weights apart."""
    given = {tensor.untyped_storage()._cdata for tensor in _tensors(objective)}
    # Held, so that no later storage gets the address of one of these.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage
        return tensor

    draws = Draws.of_step(loop.seed, 0, examples, device="meta")
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _Autocast() if loop.precision == "bf16" else nullcontext(),
    ):
        losses = objective(draws)
    assert losses["loss"].device.type == "meta"
    return sum(storage.nbytes() for storage in kept.values())


def footprint(objective: Objective[Any], loop: LoopSettings) -> Footprint:
    """The memory that training an objective takes; nothing is computed.

    Args:
        objective: on the meta device, with data that are there too, and not compiled.
        loop: how it is trained, by one process.
    """
    groups = objective.groups()
    averaged = objective.averaged()
    networks = {}
    counted: set[int] = set()
    for name, network in objective.named_children():
        # What a network shares with an earlier one is counted there, as adapters are.
        tensors = [tensor for tensor in _tensors(network) if id(tensor) not in counted]
        own = {id(tensor) for tensor in tensors}
        counted |= own
        members = [group for group in groups if any(id(parameter) in own for parameter in group.parameters)]
        networks[name] = NetworkBytes(
            parameters=sum(parameter.numel() for parameter in network.parameters() if id(parameter) in own),
            weights=_bytes(tensors),
            gradients=sum(_bytes(group.parameters) for group in members),
            moments=sum(_moment_bytes(group) for group in members),
            average=_bytes(_tensors(network)) if network is averaged else 0,
        )
    examples = loop.part_size(num_processes=1)
    return Footprint(networks, examples, _kept_bytes(objective.train(), loop, examples))
