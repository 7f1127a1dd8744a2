"""A network with matrix products in 16 or 32 bits to the same network with products in float8, by torchao, in place."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sana_sprint.layers.feed_forward import PointwiseConv2d

# Of GPUs that multiply in float8: Ada and Hopper.
_LEAST_CAPABILITY = (8, 9)


def check_float8() -> None:
    """Refuse to begin without torchao.

    Raises:
        ImportError: if it is not installed.
    """
    if find_spec("torchao") is None:
        raise ImportError("float8 needs torchao: pip install 'sana-sprint[float8]'")


def multiplies_in_float8(device: torch.device) -> bool:
    """Whether a device has products of float8 numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def quantise_to_float8(network: nn.Module) -> None:
    """Have the matrix products of a network's blocks computed in float8 (e4m3), with a scale for each row.

    Weights are rounded once, and what they are multiplied with at every product, if the device multiplies in float8. On
    others the weights alone are: that takes half the memory, and more time. Layers of `EXACT` stay as they are. This is
    for a network in memory, which shall draw; a folder is quantised while it is loaded, by diffusers' `TorchAoConfig`.

    Raises:
        ImportError: if torchao is not installed.
    """
    check_float8()
    # Late, for torchao and bitsandbytes take seconds to import.
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    from sana_sprint.quantisation.layers import pointwise_linear, quantisable_layers
    from sana_sprint.quantisation.quantisers import is_exact

    names = {name for name, _ in quantisable_layers(network) if not is_exact(name)}
    for name in names:
        layer = network.get_submodule(name)
        if isinstance(layer, PointwiseConv2d):
            linear: Any = pointwise_linear(layer)
            linear.weight, linear.bias = nn.Parameter(layer.weight.detach().flatten(1)), layer.bias
            network.set_submodule(name, linear)
    device = next(network.parameters()).device
    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if multiplies_in_float8(device)
        else Float8WeightOnlyConfig()
    )
    quantize_(network, config, filter_fn=lambda _, name: name in names)
