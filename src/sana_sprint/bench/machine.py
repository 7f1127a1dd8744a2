"""The machine to its name, its versions, and the speed of a large matrix product."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sana_sprint import __version__
from sana_sprint.bench.measure import timed

_PRODUCTS = 7
# Rows of the matrices: so many that the product, not what surrounds it, takes the time.
_SIDE = {"cpu": 4096, "cuda": 8192}
_QUICK_SIDE = 1024
_PROCESSORS = Path("/proc/cpuinfo")  # Linux has it


def processor_name() -> str:
    """The model of the CPU, as far as the system tells."""
    lines = _PROCESSORS.read_text(encoding="utf-8").splitlines() if _PROCESSORS.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe(device: torch.device) -> dict[str, Any]:
    """What a number needs beside it to mean something."""
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "sana_sprint": __version__,
        **{package: version(package) for package in ("torch", "diffusers", "transformers", "bitsandbytes")},
    }


@torch.no_grad()
def peak_speed(dtype: torch.dtype, device: torch.device, is_quick: bool = False) -> float:
    """Operations a second of the fastest of several products of two large square matrices."""
    side = _QUICK_SIDE if is_quick else _SIDE[device.type]
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    result = torch.empty_like(matrix)
    seconds = [timed(lambda: torch.mm(matrix, matrix, out=result), device)[0] for _ in range(_PRODUCTS)]
    return 2 * side**3 / min(seconds)
