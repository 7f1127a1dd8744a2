"""Linear layers and 1x1 convolutions to layers of bitsandbytes with weights of 8 or 4 bits, and back.

B batch, C channels, H W grid.
"""

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from sana_sprint.layers.feed_forward import PointwiseConv2d


def bring_scales(layer: bnb.nn.Linear8bitLt) -> None:
    """Bring what belongs to a layer's 8-bit weight to where that is.

    bitsandbytes moves the weight alone: its scales, and a second reference that keeps it alive, stay where they were.
    """
    weight: Any = layer.weight
    for holder in (weight, layer.state):  # the weight's until the first product, the state's from then on
        if holder.CB is not None:
            holder.CB = weight.data if weight.dtype == torch.int8 else holder.CB.to(weight.device)
        if holder.SCB is not None:
            holder.SCB = holder.SCB.to(weight.device)


class Linear8bit(bnb.nn.Linear8bitLt):
    """Weights and products in int8, one scale per row of either (Dettmers et al., LLM.int8(), arXiv 2208.07339)."""

    weight: Any  # bitsandbytes' own kind of parameter, with attributes

    def __init__(self, in_features: int, out_features: int, bias: bool, config: Any) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            has_fp16_weights=config.llm_int8_has_fp16_weight,
            threshold=config.llm_int8_threshold,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # On the CPU, bitsandbytes takes the scales of a matrix and of nothing else.
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear8bit":
        super()._apply(fn, recurse)
        bring_scales(self)
        return self

    def dequantised_weight(self) -> torch.Tensor:
        """(out, in), float32."""
        if self.state.has_fp16_weights:
            return self.weight.data.float()
        # The first product moves the scales from the weight to the state.
        scales: Any = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        return bnb.functional.int8_vectorwise_dequant(self.weight.data, scales)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        key, scales_key = f"{prefix}weight", f"{prefix}SCB"
        if key in state_dict:
            state_dict[key] = state_dict[key].flatten(1)
            self.state.reset_grads()  # what the last product has kept of the old weight
            if not self.state.has_fp16_weights:
                device = self.weight.device
                plain_or_codes: Any = bnb.nn.Int8Params(state_dict[key].to("cpu"), requires_grad=False)
                self.weight = plain_or_codes.to(device)
                if scales_key in state_dict:
                    self.weight.SCB = state_dict[scales_key].to(device)
                state_dict.update({key: self.weight.data, scales_key: self.weight.SCB})
        super()._load_from_state_dict(state_dict, prefix, *others)


class Linear4bit(bnb.nn.Linear4bit):
    """Weights in nf4 or fp4, 64 of them to a scale (Dettmers et al., QLoRA, arXiv 2305.14314); products in 16 or 32."""

    weight: Any  # as above

    def __init__(self, in_features: int, out_features: int, bias: bool, config: Any) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # bitsandbytes' own would cast the bias to the compute dtype, for good, and on CPUs with AVX512-BF16 repack the
        # weights at the first product. That rounds their scales, for good; it fails where in_features is no multiple of
        # 64 or out_features none of 32; and with a thousand tokens it is no faster than unpacking them each time.
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight, self.weight.quant_state, bias=bias)
        return product.to(x.dtype)

    def dequantised_weight(self) -> torch.Tensor:
        """(out, in), in the dtype that was quantised."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        key = f"{prefix}weight"
        statistics = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(f"{key}.")}
        if statistics:
            self.weight = bnb.nn.Params4bit.from_prequantized(
                state_dict[key], statistics, device=self.weight.device, module=self
            )
        elif key in state_dict:
            settings = {name: getattr(self.weight, name) for name in ("blocksize", "compress_statistics", "quant_type")}
            plain: Any = bnb.nn.Params4bit(
                state_dict[key].flatten(1).to("cpu"), quant_storage=self.quant_storage, module=self, **settings
            )
            self.weight = plain.to(self.weight.device)
        if key in state_dict:
            state_dict[key] = self.weight.data
        super()._load_from_state_dict(state_dict, prefix, *others)


class PointwiseLinear(nn.Linear):
    """A 1x1 convolution that is a linear layer: (B, C, H, W) to the same grid, and a convolution's shape on disk.

    For packages that quantise the weights of linear layers, and a mixin ahead of layers that are quantised by class.
    """

    @property
    def is_quantised(self) -> bool:
        """Whether the weight is a tensor that is made of others, codes and scales."""
        return hasattr(self.weight, "__tensor_flatten__")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[f"{prefix}weight"]
        # A weight that is packed to 4 bits, or made of other tensors, has no such shape.
        if weight.shape == (self.out_features, self.in_features) and not self.is_quantised:
            destination[f"{prefix}weight"] = weight[:, :, None, None]


class Pointwise8bit(PointwiseLinear, Linear8bit):
    """`PointwiseConv2d` in 8 bits."""


class Pointwise4bit(PointwiseLinear, Linear4bit):
    """`PointwiseConv2d` in 4 bits."""


QuantisedLayer = Linear8bit | Linear4bit


def pointwise_linear(layer: PointwiseConv2d) -> PointwiseLinear:
    """A layer of the same sizes on the same device; its weights are yet to be loaded."""
    with layer.weight.device:
        return PointwiseLinear(layer.in_channels, layer.out_channels, bias=layer.bias is not None)


def pointwise_convolution(weight: torch.Tensor, bias: nn.Parameter | None) -> PointwiseConv2d:
    """The convolution of which a linear layer's weight (out, in) is the matrix; it learns if the weight does."""
    out_channels, in_channels = weight.shape
    with torch.device("meta"):
        new = PointwiseConv2d(in_channels, out_channels, kernel_size=1)
    new.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=weight.requires_grad)
    new.bias = bias
    return new


def quantisable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | PointwiseConv2d]]:
    """Name and layer of every matrix product of a model."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, PointwiseConv2d)) and not isinstance(module, QuantisedLayer):
            yield name, module


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLayer]]:
    """Name and layer of everything in 8 or 4 bits."""
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLayer):
            yield name, module


def quantised_like(layer: nn.Linear | PointwiseConv2d, config: Any) -> QuantisedLayer:
    """A layer of the same sizes on the same device for a `BitsAndBytesConfig`; its weights are yet to be loaded."""
    has_bias = layer.bias is not None
    new: QuantisedLayer
    with layer.weight.device:
        if isinstance(layer, PointwiseConv2d):
            pointwise = Pointwise8bit if config.load_in_8bit else Pointwise4bit
            new = pointwise(layer.in_channels, layer.out_channels, has_bias, config)
        else:
            linear = Linear8bit if config.load_in_8bit else Linear4bit
            new = linear(layer.in_features, layer.out_features, has_bias, config)
    return new.requires_grad_(False)


def dequantised(layer: QuantisedLayer, dtype: torch.dtype) -> nn.Linear | PointwiseConv2d:
    """The same layer as it was before, with the weights that 8 or 4 bits have left of it."""
    weight = nn.Parameter(layer.dequantised_weight().to(dtype), requires_grad=False)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    if isinstance(layer, PointwiseLinear):
        return pointwise_convolution(weight, bias)
    with torch.device("meta"):
        new = nn.Linear(layer.in_features, layer.out_features)
    new.weight, new.bias = weight, bias
    return new
