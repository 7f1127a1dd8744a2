"""A network with weights of 8 or 4 bits and a device to the network on that device, with all that its weights need."""

from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import nn


def weight_bits(network: nn.Module) -> int | None:
    """8 or 4 for a network that bitsandbytes has quantised, diffusers' or transformers'; None for others."""
    if getattr(network, "is_loaded_in_8bit", False):
        return 8
    return 4 if getattr(network, "is_loaded_in_4bit", False) else None


def bring_scales(network: nn.Module) -> None:
    """Bring what belongs to the 8-bit weights of a network to where these are; nothing for other networks."""
    if weight_bits(network) != 8:
        return
    # Late, for bitsandbytes takes seconds to import.
    from bitsandbytes.nn import Linear8bitLt

    from sana_sprint.quantisation import layers

    for layer in network.modules():
        if isinstance(layer, Linear8bitLt):
            layers.bring_scales(layer)


def place_scales(network: nn.Module, device: torch.device) -> None:
    """Put the scales of 4-bit weights on a device; nothing for other networks. Moving the network moves them again."""
    for weight in network.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            state.to(device)


def check_may_move(name: str, network: nn.Module, device: torch.device | str | int) -> None:
    """Refuse to take 4-bit weights off the CPU once bitsandbytes has packed them for it, at their first product there.

    Raises:
        ValueError: for a device other than the CPU, which would read them in another order.
    """
    states = (getattr(weight, "quant_state", None) for weight in network.parameters())
    is_packed = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    if is_packed and str(device).partition(":")[0] != "cpu":
        raise ValueError(
            f"{name} has run on the CPU, for which bitsandbytes has packed its 4-bit weights: load it anew to move it"
        )


def move(name: str, network: nn.Module, device: torch.device) -> None:
    """Move a network as a whole; ValueError as in `check_may_move`."""
    check_may_move(name, network, device)
    network.to(device)
    bring_scales(network)


class OffloadWithScales(CpuOffload):
    """accelerate's hook of model offloading, for networks of 8-bit weights."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        module = super().init_hook(module)
        bring_scales(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        inputs = super().pre_forward(module, *args, **kwargs)
        bring_scales(module)
        return inputs
