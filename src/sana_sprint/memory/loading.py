"""A model and the memory at hand to a pipeline that fits it: plans, then calls what diffusers offers everybody."""

import os
from dataclasses import replace
from typing import Any

import diffusers
import torch
import transformers
from accelerate.utils import get_max_memory
from diffusers import PipelineQuantizationConfig

from sana_sprint.memory.allocator import give_back_what_is_freed
from sana_sprint.memory.configs import PipelineConfigs, controlnet_class, read_configs, read_controlnet
from sana_sprint.memory.planner import Bits, Budget, MemoryPlan, all_plans, best_plan
from sana_sprint.memory.stages import Networks, Workload
from sana_sprint.pipelines.base import SprintPipeline
from sana_sprint.pipelines.controlled import ControlledPipeline
from sana_sprint.pipelines.from_image import FromImagePipeline
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.sizes import byte_count

# The argument `quantization` of `load_pipeline`.
QUANTIZATIONS: dict[str, Bits] = {"8bit": 8, "4bit": 4, "none": 16}

# Options of `from_pretrained` that say how files are fetched, from whatever repository.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def load_pipeline(
    model: str | os.PathLike,
    *,
    memory: str | int | None = None,
    ram: str | int | None = None,
    quantization: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    height: int | None = None,
    width: int | None = None,
    use_resolution_binning: bool = True,
    batch_size: int = 1,
    pipeline_class: type[SprintPipeline] = SanaSprintPipeline,
    controlnet: str | os.PathLike | None = None,
    **options: Any,
) -> Any:
    """A pipeline that is loaded in the best way for which there is memory.

    `sana-sprint plan` shows the ways there are. What was chosen, and why, is the pipeline's `memory_plan`. Where a CPU
    computes in 8 or 4 bits, the process also gives back what it frees, from then on: see `memory/allocator.py`.

    Args:
        model: A pipeline's folder, or its id on the hub.
        memory: Of the device, as "8GiB" or in bytes; all of a GPU of that size can be used. None is what is free now.
        ram: Of the machine beside a GPU; None is what is free now, or with `memory` any amount.
        quantization: "8bit", "4bit", or "none" for 16 bits; None lets the memory decide. A network that is quantised
            in the checkpoint stays as it is.
        device: Where to draw; None is the GPU if there is one, else the CPU.
        dtype: Of everything that is not quantised.
        height, width, use_resolution_binning: As in the calls that are to follow, of the largest pictures.
        batch_size: The most pictures to be drawn at once.
        pipeline_class: Of the pipeline. For one that starts from pictures, or follows drawings, encoding these is
            planned for as well.
        controlnet: A ControlNet's folder, or its id on the hub, for a pipeline that follows drawings; it gets the bits
            of the transformer. None is the model's own.
        **options: For the pipeline's `from_pretrained`, such as `revision` and `cache_dir`. A ControlNet of another
            repository gets those that say how files are fetched, and not the revision.

    Returns:
        A pipeline of that class.

    Raises:
        ValueError: If nothing fits, and for arguments that cannot work, before any weights are read.
        OSError: If there is no such model, or no such ControlNet.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)} or None, got {quantization!r}")
    device = _device() if device is None else torch.device(device)
    configs = _configs(model, pipeline_class, controlnet, options)
    workload = Workload.of_call(
        configs,
        height,
        width,
        use_resolution_binning,
        batch_size=batch_size,
        starts_from_picture=issubclass(pipeline_class, FromImagePipeline),
        dtype=dtype,
    )
    budget = budget_of(device, *(None if amount is None else byte_count(amount) for amount in (memory, ram)))
    plans = all_plans(Networks(configs, workload), budget)
    plan = best_plan(plans, None if quantization is None else QUANTIZATIONS[quantization])
    return load_as_planned(model, plan, device, dtype, pipeline_class, controlnet, **options)


def _configs(
    model: str | os.PathLike, pipeline_class: type[SprintPipeline], controlnet: Any, options: dict[str, Any]
) -> PipelineConfigs:
    """Of the networks that such a pipeline has; ValueError for a ControlNet that it has not, or that is loaded."""
    follows_drawings = issubclass(pipeline_class, ControlledPipeline)
    if controlnet is not None and not follows_drawings:
        raise ValueError(f"a {pipeline_class.__name__} has no ControlNet, got controlnet={controlnet!r}")
    if controlnet is not None and not isinstance(controlnet, (str, os.PathLike)):
        raise ValueError(
            "controlnet must be a folder or an id on the hub, to be loaded as planned: one that is loaded goes with"
            f" {pipeline_class.__name__}.from_pipe(load_pipeline(...), controlnet=controlnet)"
        )
    here, elsewhere = _chosen(options, "revision", *_HUB_OPTIONS), _chosen(options, *_HUB_OPTIONS)
    configs = read_configs(model, **here)
    if not follows_drawings:
        return configs
    if controlnet is None:
        return replace(configs, controlnet=read_controlnet(model, "controlnet", **here))
    return replace(configs, controlnet=read_controlnet(controlnet, **elsewhere))


def _chosen(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def budget_of(device: torch.device, memory: int | None, ram: int | None = None) -> Budget:
    """So many bytes on a device and on the machine; without a number for the device, what is free on both.

    Raises:
        ValueError: for `ram` beside a CPU, whose memory is the machine's, and for a device whose memory is not known.
    """
    if device.type == "mps":
        raise ValueError(
            "what fits is planned for a CPU, or a GPU with memory of its own, and not for mps: choose the device cpu"
        )
    if device.type == "cpu" and ram is not None:
        raise ValueError("ram is the machine's memory beside a GPU: where the CPU draws, say memory instead")
    if memory is not None:
        return Budget(None, memory) if device.type == "cpu" else Budget(memory, ram)
    free = get_max_memory()
    if device.type == "cpu":
        # A GPU that shares the machine's memory stands for both.
        return Budget(None, free["cpu"] if "cpu" in free else min(free.values()))
    found = free.get(device.index or 0)
    if found is None:
        raise ValueError(f"the memory of {device} is not known: give memory, such as '8GiB'")
    return Budget(found, free.get("cpu") if ram is None else ram)


def load_as_planned(
    model: str | os.PathLike,
    plan: MemoryPlan,
    device: torch.device,
    dtype: torch.dtype,
    pipeline_class: type[SprintPipeline] = SanaSprintPipeline,
    controlnet: str | os.PathLike | None = None,
    **options: Any,
) -> Any:
    """A pipeline in the arrangement of a plan, ready to draw on a device; arguments as for `load_pipeline`."""
    placement, tile = plan.arrangement.placement, plan.arrangement.tile
    if device.type == "cpu" and (plan.to_quantise or plan.stored):
        give_back_what_is_freed()
    quantizations = _quantizations(plan, dtype)
    if controlnet is not None:
        hub, quantization = _chosen(options, *_HUB_OPTIONS), quantizations.pop("controlnet", None)
        options["controlnet"] = controlnet_class(read_controlnet(controlnet, **hub)).from_pretrained(
            controlnet, torch_dtype=dtype, quantization_config=quantization, **hub
        )
    if quantizations:
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=quantizations)
    if placement == "encoder on host":
        options["device_map"] = {"text_encoder": "cpu", "": str(device)}
    pipe = pipeline_class.from_pretrained(model, torch_dtype=dtype, **options)
    if placement == "resident":
        pipe.to(device)
    elif placement == "model offload":
        pipe.enable_model_cpu_offload(device=device)
    elif placement == "group offload":
        pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=True)
    if tile is not None:
        pipe.vae.enable_tiling(tile, tile)
    pipe.memory_plan = plan
    return pipe


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _quantizations(plan: MemoryPlan, dtype: torch.dtype) -> dict[str, Any]:
    """The plan's bits as configs, for the networks that it names."""
    settings: dict[str, Any] = (
        {"load_in_8bit": True}
        if plan.arrangement.bits == 8
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    )
    configs = {
        "text_encoder": transformers.BitsAndBytesConfig(**settings),
        "controlnet": diffusers.BitsAndBytesConfig(**settings),
        "transformer": diffusers.BitsAndBytesConfig(**settings),
    }
    return {name: configs[name] for name in plan.to_quantise}
