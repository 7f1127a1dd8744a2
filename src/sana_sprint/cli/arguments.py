"""The text of an option to its value, or to an error that says what was wanted."""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise

from sana_sprint.sizes import byte_count

LARGEST_SEED = 2**63 - 1
# Those of memory.loading, which `--help` must not import.
QUANTIZATIONS = ("none", "8bit", "4bit")
# Those of conditioning.table, and what stands for none of them.
CONTROLS = ("edges", "scribble", "soft_edges", "depth", "hed")
NO_CONTROL = "none"


def whole_number(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on, for an option."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from None
        if not least <= value <= LARGEST_SEED:
            raise argparse.ArgumentTypeError(f"wanted {least} or more, below 2**63, got {value}")
        return value

    return parse


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text!r}") from None
    if not 0 <= value <= 1:  # nor for nan
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"wanted a finite number, got {text}")
    return value


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels from "1024x768"."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"wanted width and height in pixels, such as 1024x768, got {text!r}")
    return int(sides[0]), int(sides[1])


def angles(text: str) -> tuple[float, ...]:
    """Descending angles in radians from "1.57,1.3,0"."""
    try:
        found = tuple(float(angle) for angle in text.split(","))
    except ValueError:
        found = ()
    if len(found) < 2 or not all(later < earlier for earlier, later in pairwise(found)):  # nan is not smaller
        raise argparse.ArgumentTypeError(
            f"wanted descending angles separated by commas, such as 1.57,1.3,0, got {text!r}"
        )
    return found


def amount(text: str) -> int:
    """Bytes from "5GB", "500MB" or "2GiB"."""
    try:
        return byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
