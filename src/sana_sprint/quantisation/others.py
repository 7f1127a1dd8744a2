"""A model on the meta device and a checkpoint's tensors to one quantised by torchao or Quanto: diffusers', for ours."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from diffusers.quantizers.quanto import QuantoQuantizer
from diffusers.quantizers.torchao import TorchAoHfQuantizer
from torch import nn

from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.quantisation.layers import (
    PointwiseLinear,
    pointwise_convolution,
    pointwise_linear,
    quantisable_layers,
)
from sana_sprint.quantisation.quantisers import EXACT, forget_quantisation, is_all_on_cpu, is_exact, prepare_adapters


def _with_exact(config: Any) -> Any:
    """A copy of a config that names `EXACT` too as what stays as it is."""
    config = deepcopy(config)
    names = config.modules_to_not_convert or ()
    config.modules_to_not_convert = list(dict.fromkeys([*EXACT, *([names] if isinstance(names, str) else names)]))
    return config


class QuantiserTorchAo(TorchAoHfQuantizer):
    """diffusers' `TorchAoConfig`: quantises `PointwiseConv2d` as well as `nn.Linear`, and leaves `EXACT` as it is."""

    quantization_config: Any
    pre_quantized: bool

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            self.quantization_config = _with_exact(quantization_config)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work. A map that leads nowhere but to the CPU offloads nothing, so all is quantised."""
        if is_all_on_cpu(kwargs.get("device_map")):
            kwargs["device_map"] = None
        super().validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(
            model, device_map=None if is_all_on_cpu(device_map) else device_map, **kwargs
        )
        for name, layer in list(quantisable_layers(model)):
            if isinstance(layer, PointwiseConv2d):
                model.set_submodule(name, pointwise_linear(layer))
        model.register_to_config(quantization_config=self.quantization_config)
        prepare_adapters()

    def create_quantized_param(self, model: nn.Module, param_value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Give a layer its weight: (out, in), or a convolution's (out, in, 1, 1)."""
        matrix = param_value.flatten(1) if param_value.ndim == 4 else param_value
        super().create_quantized_param(model, matrix, *args, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._restore_convolutions(model)
        return super()._process_model_after_weight_loading(model)

    def _dequantize(self, model: Any) -> Any:
        model = super()._dequantize(model)
        self._restore_convolutions(model)
        forget_quantisation(model)
        return model

    @staticmethod
    def _restore_convolutions(model: nn.Module) -> None:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PointwiseLinear) and not layer.is_quantised:
                model.set_submodule(name, pointwise_convolution(layer.weight, layer.bias))


class QuantiserQuanto(QuantoQuantizer):
    """diffusers' `QuantoConfig`. It leaves `EXACT` as it is, and like diffusers every convolution.

    What a config names is left with all that is in it, and may be a dotted path. What of a quantised folder is
    quantised, its keys say.
    """

    quantization_config: Any
    pre_quantized: bool

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._on_disk: frozenset[str] = frozenset()
        if not self.pre_quantized:
            self.quantization_config = _with_exact(quantization_config)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Take note of what the checkpoint holds; returns the same keys."""
        self._on_disk = frozenset(loaded_keys)
        return super().maybe_update_loaded_keys(loaded_keys, checkpoint_files)

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, keep_in_fp32_modules: Iterable[str] = (), **kwargs: Any
    ) -> None:
        left = [*(self.quantization_config.modules_to_not_convert or ()), *keep_in_fp32_modules]
        plain = {
            name: layer
            for name, layer in quantisable_layers(model)
            if (f"{name}.weight" in self._on_disk if self.pre_quantized else is_exact(name, left))
        }
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for name, layer in plain.items():
            model.set_submodule(name, layer)
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from optimum.quanto import QModuleMixin

        if self.pre_quantized:
            for layer in model.modules():
                if isinstance(layer, QModuleMixin):
                    layer.weight = nn.Parameter(_in_memory(layer.weight.data), requires_grad=False)
        return super()._process_model_after_weight_loading(model, **kwargs)


def _in_memory(tensor: Any) -> torch.Tensor:
    """The same tensor where it can be computed with.

    As diffusers reads a quantised tensor, it says that it is on the meta device, while the tensors that it is made of
    lie in a mapped file, at addresses on which Quanto's kernel for int8 crashes.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    names, context = tensor.__tensor_flatten__()
    parts = {name: _in_memory(getattr(tensor, name)) for name in names}
    return tensor.__tensor_unflatten__(parts, context, None, None)
