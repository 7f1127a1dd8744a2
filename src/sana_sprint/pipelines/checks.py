"""What a caller passed to a pipeline, as the pipeline works with it, or a ValueError that says what is wrong."""

import math
from collections.abc import Collection, Sequence
from operator import index
from typing import Any

import torch


def whole_number(name: str, value: Any) -> int:
    """A number of things as an int: integers of any library, and floats such as 64.0, from 1 on."""
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return number


def finite_number(name: str, value: Any) -> float:
    """A number as a float; refuses nan, infinities, None and everything that is no number."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_names(name: str, values: Sequence[str], choices: Collection[str]) -> None:
    """Refuses a list that holds something else than the choices."""
    unknown = [value for value in values if value not in choices]
    if unknown:
        raise ValueError(f"{name} may hold {', '.join(map(repr, choices))}, got {', '.join(map(repr, unknown))}")


def check_generator(generator: Any, batch_size: int) -> None:
    """Refuses what is neither None, one generator, nor a list of one generator for each picture."""
    if generator is None:
        return
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {one!r}")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator must be one, or one for each picture: got a list of {len(generator)} for {batch_size} pictures"
        )


def check_latents(name: str, latents: Any, shape: tuple[int, ...]) -> None:
    """Refuses what is no tensor of the shape that the pictures asked for have."""
    found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
    if found != shape:
        raise ValueError(
            f"{name} must be a tensor (pictures, channels, latent height, latent width) of shape {shape}, got {found}"
        )
