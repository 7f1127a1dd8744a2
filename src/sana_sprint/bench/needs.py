"""Configs and a workload to the bytes that measuring takes, counted on the meta device before any weights are made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sana_sprint.bench.twins import class_of
from sana_sprint.memory.configs import PipelineConfigs
from sana_sprint.memory.stages import INSTRUCTION_TOKENS, Networks, Workload, count, weight_bytes


class _TheirNetworks(Networks):
    """diffusers' networks, in place of ours."""

    @cached_property
    def transformer(self) -> Any:
        make = class_of("theirs", "SanaTransformer2DModel").from_config
        return self._empty_network(lambda: make(self.configs.transformer))

    @cached_property
    def vae(self) -> Any:
        return self._empty_network(lambda: class_of("theirs", "AutoencoderDC").from_config(self.configs.vae))

    @property
    def encode_bytes(self) -> int:
        """Of tensors at once while whole texts are read: nothing is kept of the instruction."""
        length = INSTRUCTION_TOKENS + self.workload.max_sequence_length
        ids = self._empty(self.workload.batch_size, length, dtype=torch.long)
        return count(lambda: self.text_encoder(ids, attention_mask=ids, use_cache=False)).peak


@dataclass(frozen=True)
class Needs:
    """What cases take at one workload: the weights, which both sides share, and the most tensors at once on top.

    With float8 our transformer has weights of its own beside them. The few that stay in 16 bits are counted there too,
    though they are shared.
    """

    configs: PipelineConfigs
    workload: Workload
    float8: bool = False

    @cached_property
    def _ours(self) -> Networks:
        return Networks(self.configs, self.workload)

    @cached_property
    def _theirs(self) -> Networks:
        return _TheirNetworks(self.configs, self.workload)

    def of_ours(self, names: Sequence[str]) -> int:
        """Bytes for a case that runs these networks one after the other."""
        return self._bytes(self._ours, names)

    def of_theirs(self, names: Sequence[str]) -> int:
        """The same for diffusers."""
        return self._bytes(self._theirs, names)

    def _bytes(self, networks: Networks, names: Sequence[str]) -> int:
        work: dict[str, Callable[[], int]] = {
            "text_encoder": lambda: networks.encode_bytes,
            "transformer": lambda: networks.denoise_bytes,
            "vae": networks.decode_bytes,
        }
        weights = sum(weight_bytes(getattr(networks, name)) for name in names)
        if self.float8 and "transformer" in names:
            weights += weight_bytes(self._ours.transformer, bits=8)
        return weights + max(work[name]() for name in names)
