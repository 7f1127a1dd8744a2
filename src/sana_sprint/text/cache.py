"""What a text encoder has read, kept for the next call for as long as encoder and weights stay what they are."""

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import Gemma2Model, PreTrainedModel

from sana_sprint.layers.gradients import needs_gradient
from sana_sprint.text.prefix import Prefix, Reader, read_behind, read_prefix

Value = TypeVar("Value")

MAX_PREFIXES = 2  # 27 MB each for Gemma-2-2B and SANA's instruction, in 16 bits
SAMPLE = 8  # numbers of each weight


class Recent(Generic[Value]):
    """The values that were asked for last, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: dict[Hashable, Value] = {}  # the least recent first

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there."""
        value = self._values.pop(key) if key in self._values else make()
        self._values[key] = value
        if len(self._values) > self.capacity:
            del self._values[next(iter(self._values))]
        return value


@dataclass(frozen=True, eq=False)
class Kept:
    """What one text encoder has read, with its present weights."""

    fingerprint: list[Any]
    prefixes: Recent[Prefix]
    prompts: Recent[torch.Tensor]

    def prefix(self, text_encoder: PreTrainedModel, ids: torch.Tensor) -> Prefix:
        """That of tokens (1, P), read if it is not there."""
        return self.prefixes.get(tuple(ids[0].tolist()), lambda: _prefix_to_keep(text_encoder, ids))


@dataclass(frozen=True)
class Reading:
    """How texts behind an instruction are read.

    Attributes:
        read_behind: the function of that name, or what a compiler has made of it. Its results are copied.
        lengths: ascending; texts are padded to the first of these that they fit into.
    """

    read_behind: Reader = read_behind
    lengths: tuple[int, ...] = ()


def _prefix_to_keep(text_encoder: PreTrainedModel, ids: torch.Tensor) -> Prefix:
    # Looked up before the encoder runs, for which its weights are fetched.
    places = {weight.device.type for weight in text_encoder.parameters()}
    prefix = read_prefix(text_encoder, ids)
    if places & {"cpu", "meta"} - {ids.device.type}:
        for layer in prefix.keys_and_values.layers:
            layer.offload()  # as the encoder is
    return prefix


def _stored(tensor: torch.Tensor | None) -> list[torch.Tensor]:
    """The plain tensors that hold a weight: itself, or what a tensor of a quantising class wraps."""
    if tensor is None:
        return []
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _stored(getattr(tensor, name))]


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[Any]:
    """What differs once weights, hooks or the way of attention have changed; takes about a millisecond.

    torch counts the changes of a tensor in place. What it does not count (through `.data`, as PEFT does when it merges
    adapters) and weights that were exchanged or cast show in a sample of the numbers. Where the weights lie makes no
    difference, for offloading moves them at every call. Weights that accelerate takes away between calls are known by
    the hook that has them.
    """
    changes: list[Any] = []
    samples: dict[Any, list[torch.Tensor]] = {}
    for module in model.modules():
        changes += (*module._forward_pre_hooks, *module._forward_hooks)  # torch gives no number twice
        parameters = [tensor for weight in module._parameters.values() for tensor in _stored(weight)]
        buffers = [tensor for weight in module._buffers.values() for tensor in _stored(weight)]
        # Not those of buffers, which become other tensors whenever the module moves.
        changes += (tensor._version for tensor in parameters if not (tensor.is_meta or tensor.is_inference()))
        for tensor in parameters + buffers:
            if tensor.is_meta:
                changes.append(ref(getattr(module, "_hf_hook", module)))
                continue
            size = min(SAMPLE, tensor.numel())
            # From the middle: an embedding begins with padding, which is zero in every model.
            start = tensor.storage_offset() + (tensor.numel() - size) // 2
            group = samples.setdefault((tensor.dtype, tensor.device), [])
            group.append(torch.as_strided(tensor, (size,), (1,), start))
    sampled = [
        (dtype, torch.cat(group).view(torch.uint8).cpu().numpy().tobytes()) for (dtype, _), group in samples.items()
    ]
    return [getattr(model.config, "_attn_implementation", None), changes, sampled]


def _has_adapters(model: nn.Module) -> bool:
    if "peft" not in sys.modules:  # then nothing of it can be in the model
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _can_read_in_parts(text_encoder: nn.Module) -> bool:
    """Not known of encoders other than Gemma-2, compiled ones among them, and not so of one in training.

    There gradient checkpointing forgets keys and values, and dropout sees to it that nothing is read alike twice.
    """
    return isinstance(text_encoder, Gemma2Model) and not text_encoder.training


def _serves_again(text_encoder: nn.Module) -> bool:
    """Whether what is read in one call may serve the next: not with gradients, nor with adapters (LoRA).

    The scale of adapters is no weight, and changes from call to call.
    """
    return not needs_gradient(text_encoder.parameters()) and not _has_adapters(text_encoder)


class TextCache:
    """Instructions and prompts that text encoders have read, for `encode_prompts`.

    An instruction is the same in every call and ten times as long as a prompt, so its keys and values are kept (27 MB
    for Gemma-2-2B, beside the encoder or, if that is offloaded, on the CPU). The embeddings of the last prompts are
    kept as well, without padding. All of it is forgotten when the encoder's weights change, and when it is deleted.

    What cannot be noticed is a change of single numbers through `.data`, or a hook that behaves in another way than it
    did before: then `clear()`.

    Args:
        max_prompts: How many calls' prompts are kept; 0 for none.

    Attributes:
        reading: How texts are read that are not kept.
    """

    def __init__(self, max_prompts: int = 16) -> None:
        self.max_prompts = max_prompts
        self.reading = Reading()
        self._kept: WeakKeyDictionary[PreTrainedModel, Kept] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["TextCache"], tuple[int]]:
        """A copy is empty: a copied pipeline has another encoder."""
        return TextCache, (self.max_prompts,)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def kept(self, text_encoder: PreTrainedModel, device: torch.device) -> Kept | None:
        """What is kept of an encoder's readings, to be added to; None where texts must be read whole."""
        if not _can_read_in_parts(text_encoder):
            return None
        if not _serves_again(text_encoder):
            return Kept([], Recent(MAX_PREFIXES), Recent(0))  # for the present call
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        present = [device, autocast, *fingerprint(text_encoder)]
        kept = self._kept.get(text_encoder)
        if kept is None or kept.fingerprint != present:
            kept = self._kept[text_encoder] = Kept(present, Recent(MAX_PREFIXES), Recent(self.max_prompts))
        return kept
