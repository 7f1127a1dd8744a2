"""A pipeline's networks and the devices they are for: maps, offloading and casts, and what cannot be combined."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from sana_sprint.pipelines.checks import check_names
from sana_sprint.pipelines.scales import (
    OffloadWithScales,
    bring_scales,
    check_may_move,
    move,
    place_scales,
    weight_bits,
)


def checked_device(name: str, device: Any) -> torch.device:
    """The device of a map's entry.

    Raises:
        ValueError: if there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device_map puts {name or 'the rest'!r} on {device!r}, which is not there: {reason}"
        ) from None
    if found.type == "meta":
        raise ValueError(f"device_map puts {name or 'the rest'!r} on 'meta', where nothing can be computed")
    return found


class PlacedPipeline(DiffusionPipeline):
    """A DiffusionPipeline that takes maps of its networks, and refuses at once what would fail or corrupt later."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers' own, with a `device_map` that may be a dictionary.

        Raises:
            ValueError: before anything is loaded, if the map names a network that the pipeline has not or a device
                that is not there, or for `max_memory` without `device_map="balanced"`.
        """
        device_map = kwargs.get("device_map")
        if kwargs.get("max_memory") is not None and device_map != "balanced":
            raise ValueError(f"max_memory is for device_map='balanced', got it with device_map={device_map!r}")
        if not isinstance(device_map, Mapping):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        devices = cls._devices(kwargs.pop("device_map"))
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name, network in pipe._networks().items():
            move(name, network, devices[name])
        pipe.hf_device_map = {name: str(device) for name, device in devices.items()}
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """diffusers' own; networks that are offloaded as a whole stay so."""
        pipe = super().from_pipe(pipeline, **kwargs)
        if getattr(pipeline, "_all_hooks", None):
            pipe.enable_model_cpu_offload(device=pipeline._offload_device)
        return pipe

    @classmethod
    def _devices(cls, device_map: Mapping[str, Any]) -> dict[str, torch.device]:
        """The device of every network by its name. A map's "" stands for those that it does not name, else the CPU."""
        names = cls.model_cpu_offload_seq.split("->")
        unknown = [name for name in device_map if name not in (*names, "")]
        if unknown:
            raise ValueError(
                f"device_map may name {', '.join(map(repr, names))} and '' for the rest,"
                f" got {', '.join(map(repr, unknown))}"
            )
        checked = {name: checked_device(name, device) for name, device in device_map.items()}
        rest = checked.get("", torch.device("cpu"))
        return {name: checked.get(name, rest) for name in names}

    def _networks(self) -> dict[str, Any]:
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def _execution_device(self) -> torch.device:
        """diffusers contract: where a call's tensors are. Other networks than the transformer may be elsewhere."""
        return super()._execution_device if self.transformer is None else self.device_of("transformer")

    def __setattr__(self, name: str, value: Any) -> None:
        replaced = self.__dict__.get(name)
        super().__setattr__(name, value)
        if isinstance(replaced, nn.Module) and replaced is not value and self.__dict__.get("_all_hooks"):
            # Each network's hook holds the network before it, which would stay in memory.
            self.enable_model_cpu_offload(device=self._offload_device)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast every network of the pipeline, as diffusers does; returns the pipeline.

        Raises:
            ValueError: before anything is moved, for a cast of what is quantised or offloaded in groups, or if 4-bit
                weights have been packed for the CPU.
        """
        dtype = kwargs.get("dtype") or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
        for name, network in self._networks().items():
            if dtype is None or network.dtype == dtype:
                continue
            if getattr(network, "is_quantized", False):
                raise ValueError(
                    f"{name} is quantised and cannot be cast from {network.dtype} to {dtype}: load it with"
                    f" torch_dtype={dtype}, or move it only, with to(device)"
                )
            if self._maybe_raise_error_if_group_offload_active(module=network):
                raise ValueError(f"{name} is offloaded in groups and cannot be cast to {dtype}: cast it before")
        device = kwargs.get("device") or next((arg for arg in args if not isinstance(arg, torch.dtype)), None)
        if device is not None:
            self._check_may_move(device)
        super().to(*args, **kwargs)
        for network in self._networks().values():
            bring_scales(network)
        return self

    def reset_device_map(self) -> None:
        """Move every network to the CPU, and forget the map that they were placed by."""
        super().reset_device_map()
        for network in self._networks().values():
            bring_scales(network)

    def _check_is_not_mapped(self) -> None:
        if self._is_pipeline_device_mapped():
            raise ValueError("a pipeline loaded with a device_map is not offloaded: call reset_device_map() before")

    def _check_may_move(self, device: Any) -> None:
        for name, network in self._networks().items():
            check_may_move(name, network, device)

    def put_away(self, name: str) -> None:
        """Move a network that is offloaded as a whole back to where it waits, before its turn is over."""
        network = getattr(self, name)
        offload = getattr(network, "_hf_hook", None)
        if isinstance(offload, CpuOffload):
            offload.init_hook(network)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the networks on the CPU, and move each as a whole to a device when it runs, as diffusers does.

        Works with weights of 8 and 4 bits.

        Args:
            gpu_id: Number of the device.
            device: The device or its kind; the accelerator by default.

        Raises:
            ValueError: for a pipeline with a device map, one that is offloaded in groups, or 4-bit weights that have
                been packed for the CPU.
            RuntimeError: if there is no accelerator and no device is given.
        """
        self._check_is_not_mapped()
        self._check_may_move("accelerator" if device is None else device)
        super().enable_model_cpu_offload(gpu_id, device)
        for offload in self._all_hooks:
            if weight_bits(offload.model) == 8:
                offload.hook = OffloadWithScales(offload.hook.execution_device, offload.hook.prev_module_hook)
                add_hook_to_module(offload.model, offload.hook)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the weights on the CPU, and move each layer's to a device when the layer runs, as diffusers does.

        Args:
            gpu_id, device: As for `enable_model_cpu_offload`.

        Raises:
            ValueError: for networks of 8 or 4 bits, a device that is the CPU, a pipeline with a device map, or one that
                is offloaded in groups.
            RuntimeError: if there is no accelerator and no device is given.
        """
        self._check_is_not_mapped()
        for name, network in self._networks().items():
            if weight_bits(network) is not None:
                raise ValueError(
                    f"{name} has weights of {weight_bits(network)} bits, whose scales sequential offloading loses:"
                    " use enable_model_cpu_offload()"
                )
        if device is not None and torch.device(device).type == "cpu":
            raise ValueError("sequential offloading needs another device than the CPU, on which the weights wait")
        super().enable_sequential_cpu_offload(gpu_id, device)

    def _check_groups(self, names: Collection[str], device: Any, use_stream: bool, folder: str | None) -> None:
        """Refuse networks that cannot be offloaded in groups, or not any more, and a folder that may hold others."""
        self._check_is_not_mapped()
        self._check_may_move(device)
        for name, network in self._networks().items():
            if name not in names:
                continue
            bits = weight_bits(network)
            if bits == 8 or (bits == 4 and not use_stream):
                instead = "pass use_stream=True, " if bits == 4 else ""
                raise ValueError(
                    f"{name} has weights of {bits} bits, whose scales offloading in groups does not move: {instead}name"
                    " it in exclude_modules, or use enable_model_cpu_offload()"
                )
            if self._maybe_raise_error_if_group_offload_active(module=network):
                raise ValueError(f"{name} is offloaded in groups already: load it anew, or name it in exclude_modules")
        if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
            # diffusers would take weights of the same name that it finds there for those of this pipeline.
            raise ValueError(
                f"offload_to_disk_path must be an empty folder or none yet, got {folder}, which is not empty"
            )

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Keep the weights on one device, and move those of a block or layer to another when it runs.

        The autoencoder's groups are always its layers, without streams: it runs them strip by strip, in an order that
        cannot be foreseen from the blocks. Weights of 4 bits leave their scales on the device, an eighth of them.

        Args:
            onload_device, offload_device: Where networks compute, and where their weights wait.
            offload_type: "block_level" or "leaf_level", which is by layers.
            num_blocks_per_group: Wanted for "block_level".
            non_blocking: Whether to go on while weights move.
            use_stream: Whether the next group moves while one computes; for CUDA.
            record_stream: With streams, faster for somewhat more memory.
            low_cpu_mem_usage: With streams, whether memory is pinned when it is needed, not from the start.
            offload_to_disk_path: A folder for the weights to wait in, empty or yet to be made.
            exclude_modules: Names of networks that are put on `onload_device` for good.

        Raises:
            ValueError: for networks that are of 8 bits or, without streams, of 4; for a pipeline with a device map or
                that is offloaded already; for a folder that is not empty, or settings that diffusers refuses.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        check_names("exclude_modules", excluded, self.components)
        networks = self._networks()
        self._check_groups(networks.keys() - {*excluded}, onload_device, use_stream, offload_to_disk_path)
        options: dict[str, Any] = {
            "onload_device": torch.device(onload_device),
            "offload_device": torch.device(offload_device),
            "offload_type": offload_type,
            "num_blocks_per_group": num_blocks_per_group,
            "non_blocking": non_blocking,
            "use_stream": use_stream,
            "record_stream": record_stream,
            "low_cpu_mem_usage": low_cpu_mem_usage,
        }
        by_layer = {**options, "offload_type": "leaf_level", "use_stream": False, "record_stream": False}
        for name, network in networks.items():
            if name not in excluded:
                # A folder each: files are named after layers, and those of one name would be taken for the same.
                folder = None if offload_to_disk_path is None else str(Path(offload_to_disk_path) / name)
                enable = getattr(network, "enable_group_offload", None) or partial(apply_group_offloading, network)
                enable(**(by_layer if name == "vae" else options), offload_to_disk_path=folder)
                place_scales(network, options["onload_device"])  # for good: groups are of weights alone
            elif not self._maybe_raise_error_if_group_offload_active(module=network):
                move(name, network, options["onload_device"])
