"""A model on the meta device and a checkpoint's tensors to a model of 8 or 4 bits: diffusers' quantisers, for ours."""

import logging
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from diffusers.utils import is_peft_available
from torch import nn

from sana_sprint.quantisation.layers import dequantised, quantisable_layers, quantised_layers, quantised_like
from sana_sprint.quantisation.pieces import InPieces

logger = logging.getLogger(__name__)

# What stays in 16 or 32 bits, by name. All of it together is 3 % of the weights of the 1.6B transformer. Norms, tables,
# the patch embedding and the depthwise convolution are no matrix products of tokens and stay so by themselves.
EXACT = (
    "time_embed",  # time and guidance modulate every token of every block: an error here is the same error everywhere
    "caption_projection",  # Gemma's features have channels far outside the others' range, and set the scale of a row
    "proj_out",  # its rounding is the output's
    "input_block",  # a ControlNet's way in and ways out, small beside its blocks: what they round is the control
    "controlnet_blocks",
)

# In a checkpoint, the keys beside a weight that say that it is quantised.
_STATISTICS = re.compile(r"(.+)\.(?:SCB|weight\.quant_state\.bitsandbytes__\w+)")


def is_exact(path: str, others: Iterable[str] = ()) -> bool:
    """Whether a layer stays in 16 or 32 bits: its dotted path has a name of `EXACT`, or of the others, among its parts.

    Names may be dotted themselves: "time_embed", "transformer_blocks.1" and "attn2.to_k" are some.
    """
    return any(f".{name}." in f".{path}." for name in (*EXACT, *others))


def has_accelerator() -> bool:
    """Whether there is a device other than the CPU that bitsandbytes can compute on."""
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def is_all_on_cpu(device_map: Any) -> bool:
    """Whether a device map, as given or as inferred from the memory at hand, leads nowhere but to the CPU."""
    if isinstance(device_map, Mapping):
        return all(str(device) == "cpu" for device in device_map.values())
    return not has_accelerator()


def prepare_adapters() -> None:
    """Where PEFT is installed, let it adapt quantised convolutions."""
    if is_peft_available():
        import_module("sana_sprint.quantisation.adapters").teach_peft()


def forget_quantisation(model: Any) -> None:
    """Make a dequantised model an ordinary one, which may be cast and whose folder claims nothing else."""
    del model.quantization_method
    # diffusers has no public way to take an entry out of a config.
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})


class _SanaQuantiser:
    """Mixin, ahead of a bitsandbytes quantiser of diffusers.

    It quantises `PointwiseConv2d` as well as `nn.Linear`, leaves `EXACT` as it is beside what the caller's
    `llm_int8_skip_modules` names, and works on the CPU. Which layers of a quantised folder are quantised, its keys say,
    so that it reads folders that diffusers has written too.
    """

    quantization_config: Any
    pre_quantized: bool
    _is_on_cpu = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # A copy: the caller's own stays as it is.
        super().__init__(deepcopy(quantization_config), **kwargs)  # type: ignore[call-arg]
        self._on_disk: set[str] = set()
        self._keys_of: dict[str, set[str]] = {}
        self._waiting: dict[str, torch.Tensor] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work: before anything is read, and again when the device map is known.

        Raises:
            ValueError: if weights would have to lie on disk, or for a map of GPU and CPU that diffusers refuses.
        """
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and not has_accelerator() and "disk" in device_map.values():
            on_disk = ", ".join(name for name, device in device_map.items() if device == "disk")
            raise ValueError(
                f"weights of 8 and 4 bits cannot lie on disk, and {on_disk} would: give max_memory room for the model,"
                ' or pass device_map="cpu"'
            )
        self._is_on_cpu = is_all_on_cpu(device_map)
        if not self._is_on_cpu:
            super().validate_environment(*args, **kwargs)  # type: ignore[misc]

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of what is not quantised: bfloat16 on the CPU, which computes slowly in diffusers' float16."""
        if torch_dtype is None and self._is_on_cpu:
            return torch.bfloat16
        return super().update_torch_dtype(torch_dtype)  # type: ignore[misc]

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU where there is nothing else, and diffusers' choice where there is."""
        if device_map is None and self._is_on_cpu:
            return {"": "cpu"}
        return super().update_device_map(device_map)  # type: ignore[misc]

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Take note of what the checkpoint holds; returns the same keys."""
        self._on_disk = {found[1] for found in map(_STATISTICS.fullmatch, loaded_keys) if found}
        self._keys_of = {name: set() for name in self._on_disk}
        for key in loaded_keys:
            name = next((name for name in self._parents(key) if name in self._on_disk), None)
            if name is not None:
                self._keys_of[name].add(key)
        return super().maybe_update_loaded_keys(loaded_keys, checkpoint_files)  # type: ignore[misc]

    @staticmethod
    def _parents(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[:count]) for count in range(1, len(parts))]

    def maybe_update_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What can be loaded of a shard and of what is left of those before it: quantised layers, whole or not yet."""
        state_dict = {**self._waiting, **state_dict}
        self._waiting = {}
        for keys in self._keys_of.values():
            if keys - state_dict.keys():
                self._waiting.update({key: state_dict.pop(key) for key in keys & state_dict.keys()})
        return state_dict

    @property
    def supports_parallel_loading(self) -> bool:
        """Not of a quantised folder: `maybe_update_state_dict` takes its shards in turn."""
        return not self.pre_quantized

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, keep_in_fp32_modules: Iterable[str] = (), **kwargs: Any
    ) -> None:
        config = self.quantization_config
        left = dict.fromkeys([*EXACT, *(config.llm_int8_skip_modules or ()), *keep_in_fp32_modules])
        self.modules_to_not_convert = [*left, *self._offloaded(device_map)]
        layers = dict(quantisable_layers(model))
        if self.pre_quantized:
            chosen = layers.keys() & self._on_disk
        else:
            chosen = {name for name in layers if not is_exact(name, self.modules_to_not_convert)}
            config.llm_int8_skip_modules = list(left)  # as written to a folder: what is not quantised in it
        for name in chosen:
            model.set_submodule(name, quantised_like(layers[name], config))
        if not chosen:
            logger.warning("no layer of %s is quantised: all are in %s", type(model).__name__, list(left))
        model.register_to_config(quantization_config=config)
        setattr(model, "is_loaded_in_8bit" if config.load_in_8bit else "is_loaded_in_4bit", True)
        prepare_adapters()

    def _offloaded(self, device_map: Any) -> list[str]:
        """What a map of GPU and CPU leaves on the CPU, unquantised."""
        if self._is_on_cpu or not isinstance(device_map, Mapping) or len(device_map) < 2:
            return []
        offloaded = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
        if offloaded and not self.quantization_config.llm_int8_enable_fp32_cpu_offload:
            raise ValueError(
                f"device_map leaves {', '.join(offloaded)} on CPU or disk beside a GPU, which is possible for modules"
                " that are not quantised: allow it with llm_int8_enable_fp32_cpu_offload=True, or put all on one device"
            )
        return offloaded

    def create_quantized_param(self, model: nn.Module, param_value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Give a layer its weight, (out, in) or a convolution's (out, in, 1, 1), or its bias."""
        matrix = param_value.flatten(1) if param_value.ndim == 4 else param_value
        with InPieces():
            super().create_quantized_param(model, matrix, *args, **kwargs)  # type: ignore[misc]

    def _dequantize(self, model: Any) -> Any:
        for name, layer in list(quantised_layers(model)):
            new = dequantised(layer, model.dtype)
            hook = getattr(layer, "_hf_hook", None)
            if hook is not None:
                remove_hook_from_module(layer)
                add_hook_to_module(new, hook)
            model.set_submodule(name, new)
        forget_quantisation(model)
        model.is_loaded_in_8bit = model.is_loaded_in_4bit = False
        return model


class Quantiser8bit(_SanaQuantiser, BnB8BitDiffusersQuantizer):
    """diffusers' `load_in_8bit`."""


class Quantiser4bit(_SanaQuantiser, BnB4BitDiffusersQuantizer):
    """diffusers' `load_in_4bit`."""
