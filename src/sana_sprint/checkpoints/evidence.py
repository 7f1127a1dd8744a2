"""Shapes of a checkpoint's tensors to sizes: what most of them agree on, and what stays in doubt.

One damaged tensor must not pass for a size of its own: sizes that several tensors show are put to the vote, so that
the odd one out is found to be mis-shaped later.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# Settings that no tensor's shape contradicts, whatever is given for them.
NUMBERS = ("dropout", "norm_eps", "guidance_embeds_scale", "timestep_scale", "scaling_factor")


@dataclass(frozen=True)
class Ambiguity:
    """A setting that keys and shapes cannot tell: what was chosen, and what else it could be."""

    setting: str
    chosen: Any
    others: tuple[Any, ...]
    question: str

    def __str__(self) -> str:
        others = " or ".join(str(other) for other in self.others)
        return f"{self.question}: took {self.setting} {self.chosen}, not {others}; give {self.setting} to override"


def vote(values: Iterable[int], default: int | None = None, what: str = "") -> int:
    """The most frequent positive value, the first of several; `default`, or else a ValueError, if there is none."""
    winners = Counter(value for value in values if value > 0).most_common(1)
    if winners:
        return winners[0][0]
    if default is None:
        raise ValueError(f"the {what} cannot be told: the tensors that show it are missing or empty")
    return default


def count_of(indices: Iterable[int]) -> int:
    """How many blocks there are, by their numbers: the largest count of which at least half are present."""
    count = 0
    for seen, index in enumerate(sorted(set(indices)), start=1):
        if 2 * seen >= index + 1:
            count = index + 1
    return count


def sizes(shapes: Shapes, pattern: str, axis: int) -> list[int]:
    """Size along `axis` of every tensor whose whole name matches `pattern` and that has such an axis."""
    expression = re.compile(pattern)
    found = (shape for name, shape in shapes.items() if expression.fullmatch(name))
    return [shape[axis] for shape in found if -len(shape) <= axis < len(shape)]


def numbers(shapes: Shapes, pattern: str) -> list[int]:
    expression = re.compile(pattern)
    return [int(found[1]) for name in shapes if (found := expression.match(name))]


def hint_in(pattern: str, name: str) -> str:
    """The last place in `name`, in lower case, that matches `pattern`; empty if none."""
    found = re.findall(pattern, name.lower())
    return found[-1] if found else ""


def positive_integer(given: Mapping[str, Any], setting: str) -> int | None:
    """A setting that must be a positive integer if it is given at all."""
    value = given.get(setting)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{setting} must be a positive integer, got {value!r}")
    return value


def with_given(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The config with settings that are known; ValueError for a name that it does not have, or for no number."""
    unknown = sorted(given.keys() - config.keys())
    if unknown:
        raise ValueError(f"no such setting: {', '.join(unknown)}; the settings are {', '.join(config)}")
    for name in NUMBERS:
        value = given.get(name, 0.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return {**config, **given}
