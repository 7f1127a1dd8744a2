"""A quantised layer to the same with LoRA adapters, whose files fit the plain layer: PEFT's layers, for ours."""

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from peft.tuners.lora.torchao import TorchaoLoraLinear as PeftLinearTorchAo
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from sana_sprint.quantisation.layers import (
    Linear4bit,
    Linear8bit,
    Pointwise4bit,
    Pointwise8bit,
    PointwiseLinear,
    QuantisedLayer,
    pointwise_convolution,
)


class _Fusing(LoraLayer):
    """Mixin, ahead of PEFT's layer: adapters fused together are rounded once, and come out again without a trace.

    PEFT's own rounds at every adapter, and again when it takes one out. Until then the weight as it was is kept too.
    """

    lora_A: Any  # the halves of each adapter, by its name
    lora_B: Any
    get_delta_weight: Any
    _unfused: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters, those that are active if none are named, to the weight.

        Raises:
            ValueError: with `safe_merge`, for an adapter with NaN; for a bias where the layer has none; and after
                `dequantize()`, for that has left PEFT's layers for quantised weights around plain ones.
        """
        if self.lora_variant:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]  # DoRA scales the weight, too
            return
        layer = self.get_base_layer()
        if not isinstance(layer, QuantisedLayer):
            raise ValueError("adapters of a model that was quantised cannot be fused: unload and load them again")
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        fused = self._fused_with(layer, names)
        if safe_merge and not all(value.isfinite().all() for value in fused.values()):
            raise ValueError(f"there is NaN or infinity in one of the adapters {', '.join(names)}")
        if not self.merged:
            self._unfused = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.load_state_dict(fused, strict=False)
        self.merged_adapters.extend(names)

    def _fused_with(self, layer: QuantisedLayer, names: list[str]) -> dict[str, torch.Tensor]:
        weight = layer.dequantised_weight()
        fused = {"weight": sum((self.get_delta_weight(name) for name in names), start=weight).to(weight.dtype)}
        if biased := [name for name in names if self.lora_bias[name]]:
            if layer.bias is None:
                raise ValueError(f"the bias of {', '.join(biased)} cannot be fused into a layer that has none")
            fused["bias"] = sum((self.lora_B[name].bias * self.scaling[name] for name in biased), start=layer.bias)
        return fused

    def unmerge(self) -> None:
        """Take every fused adapter out of the weight."""
        if self._unfused is None:
            super().unmerge()  # type: ignore[misc]
            return
        self.get_base_layer().load_state_dict(self._unfused)
        self._unfused = None
        self.merged_adapters.clear()


class _Pointwise(LoraLayer):
    """Mixin, ahead of a layer for linear ones: both halves of an adapter are 1x1 convolutions."""

    lora_A: Any
    lora_B: Any

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does for a linear layer, and make it one of a convolution."""
        super().update_layer(adapter_name, *args, **kwargs)
        for halves in (self.lora_A, self.lora_B):
            linear = halves[adapter_name]
            halves[adapter_name] = pointwise_convolution(linear.weight, linear.bias)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Plain LoRA and nothing else.

        Raises:
            ValueError: for DoRA and other variants, which take the halves for linear layers.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise ValueError(
                f"quantised 1x1 convolutions take plain LoRA, got {type(variant).__name__}: leave conv_inverted and"
                " conv_point out of target_modules, or adapt a model that is not quantised"
            )

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What an adapter adds to the weight: (out, in)."""
        down, up = (halves[adapter].weight.flatten(1) for halves in (self.lora_A, self.lora_B))
        return up @ down * self.scaling[adapter]


class Lora8bit(_Fusing, PeftLinear8bit):
    """`Linear8bit` with adapters."""


class Lora4bit(_Fusing, PeftLinear4bit):
    """`Linear4bit` with adapters."""


class PointwiseLora8bit(_Pointwise, Lora8bit):
    """`Pointwise8bit` with adapters."""


class PointwiseLora4bit(_Pointwise, Lora4bit):
    """`Pointwise4bit` with adapters."""


class PointwiseLoraTorchAo(_Pointwise, PeftLinearTorchAo):
    """`PointwiseLinear` with adapters, its weight quantised by torchao."""


# The first that a layer is an instance of counts.
_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    Pointwise8bit: PointwiseLora8bit,
    Pointwise4bit: PointwiseLora4bit,
    PointwiseLinear: PointwiseLoraTorchAo,
    Linear8bit: Lora8bit,
    Linear4bit: Lora4bit,
}


@cache
def teach_peft() -> None:
    """From here on PEFT adapts our layers with those above, and everything else as before.

    PEFT learns of other people's layers from an adapter's config alone, and diffusers makes the config itself when it
    loads an adapter: so every config names them when PEFT reads it, and the caller's own stays as it is.
    """
    theirs: Callable[..., nn.Module] = LoraModel._create_new_module

    def create(lora_config: LoraConfig, *args: Any, **kwargs: Any) -> nn.Module:
        config = copy(lora_config)
        config._custom_modules = {**_ADAPTED, **(lora_config._custom_modules or {})}
        return theirs(config, *args, **kwargs)

    LoraModel._create_new_module = staticmethod(create)  # type: ignore[method-assign]
