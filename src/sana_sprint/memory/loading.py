"""A model and the memory at hand to a pipeline that fits it: plans, then calls what diffusers offers everybody."""

import os
from typing import Any

import diffusers
import torch
import transformers
from accelerate.utils import get_max_memory
from diffusers import PipelineQuantizationConfig

from sana_sprint.memory.allocator import give_back_what_is_freed
from sana_sprint.memory.configs import read_configs
from sana_sprint.memory.planner import Bits, Budget, MemoryPlan, all_plans, best_plan
from sana_sprint.memory.stages import Networks, Workload
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.sizes import byte_count

# The argument `quantization` of `load_pipeline`.
QUANTIZATIONS: dict[str, Bits] = {"8bit": 8, "4bit": 4, "none": 16}


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
    batch_size: int = 1,
    **options: Any,
) -> SanaSprintPipeline:
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
        height, width: Of the largest pictures to be drawn, in pixels; None is what the model was trained on.
        batch_size: The most pictures to be drawn at once.
        **options: For `SanaSprintPipeline.from_pretrained`, such as `revision` and `cache_dir`.

    Raises:
        ValueError: If nothing fits, and for arguments that cannot work, before any weights are read.
        OSError: If there is no such model.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)} or None, got {quantization!r}")
    device = _device() if device is None else torch.device(device)
    configs = read_configs(model)
    side = configs.picture_size
    size = Workload(height=height or side, width=width or side, batch_size=batch_size, dtype=dtype)
    budget = budget_of(device, *(None if amount is None else byte_count(amount) for amount in (memory, ram)))
    plans = all_plans(Networks(configs, size), budget)
    plan = best_plan(plans, None if quantization is None else QUANTIZATIONS[quantization])
    return load_as_planned(model, plan, device, dtype, **options)


def budget_of(device: torch.device, memory: int | None, ram: int | None = None) -> Budget:
    """So many bytes on a device and on the machine; without a number for the device, what is free on both."""
    if memory is not None:
        return Budget(None, memory) if device.type == "cpu" else Budget(memory, ram)
    free = get_max_memory()
    return Budget(None, free["cpu"]) if device.type == "cpu" else Budget(free[device.index or 0], ram or free["cpu"])


def load_as_planned(
    model: str | os.PathLike, plan: MemoryPlan, device: torch.device, dtype: torch.dtype, **options: Any
) -> SanaSprintPipeline:
    """A pipeline in the arrangement of a plan, ready to draw on a device; options as for `from_pretrained`."""
    placement, tile = plan.arrangement.placement, plan.arrangement.tile
    if device.type == "cpu" and (plan.to_quantise or plan.stored):
        give_back_what_is_freed()
    if plan.to_quantise:
        options["quantization_config"] = _quantization(plan, dtype)
    if placement == "encoder on host":
        options["device_map"] = {"text_encoder": "cpu", "transformer": str(device), "vae": str(device)}
    pipe = SanaSprintPipeline.from_pretrained(model, torch_dtype=dtype, **options)
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


def _quantization(plan: MemoryPlan, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """Of the plan's bits, for the networks that it names."""
    settings: dict[str, Any] = (
        {"load_in_8bit": True}
        if plan.arrangement.bits == 8
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    )
    configs = {
        "transformer": diffusers.BitsAndBytesConfig(**settings),
        "text_encoder": transformers.BitsAndBytesConfig(**settings),
    }
    return PipelineQuantizationConfig(quant_mapping={name: configs[name] for name in plan.to_quantise})
