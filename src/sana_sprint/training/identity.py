"""Networks and data to a few digits that tell them apart, so that a run goes on only with what it began with."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_sprint.files import write_whole
from sana_sprint.training.datasets.source import LatentSource

# Training changes nearly every number of a network, and other pictures change nearly every one of their latents.
_LOOKED_AT = 4096


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Sixteen hex digits that change with tensors: names, shapes, and some thousand numbers of each, evenly apart.

    They do not depend on the dtype, if it holds these numbers, nor on the device.
    """
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        numbers = tensor.detach().flatten()
        looked_at = numbers[:: max(1, len(numbers) // _LOOKED_AT)]
        found.update(looked_at.double().numpy(force=True).tobytes())
    return found.hexdigest()[:16]


def network_digest(network: nn.Module) -> str:
    """The `tensors_digest` of all parameters and buffers that a network is stored with."""
    return tensors_digest(network.state_dict())


def sources(data: LatentSource, **networks: nn.Module) -> dict[str, str]:
    """By name, what a run learns from: its data, and networks as they are before they are cast or trained."""
    return {"data": data.identity(), **{name: network_digest(network) for name, network in networks.items()}}


def data_sources(recipe: Any, settings: Iterable[str], **networks: nn.Module) -> dict[str, Any]:
    """By name, what data are made from: some settings of a recipe, and networks."""
    digests = {name: network_digest(network) for name, network in networks.items()}
    return {**{name: getattr(recipe, name) for name in settings}, **digests}


def made_once(
    path: Path, made_from: Mapping[str, Any], make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Tensors by name, from a file; it is written at first, and again where it was made from something else."""
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if isinstance(kept, dict) and kept.get("made_from") == dict(made_from):
            return kept["tensors"]
    tensors = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: torch.save({"made_from": dict(made_from), "tensors": tensors}, partial))
    return tensors
