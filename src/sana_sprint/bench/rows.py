"""One case at one model, size and batch, with what was measured of it, as data and in words."""

from typing import NamedTuple

from sana_sprint.bench.measure import Measured
from sana_sprint.bench.spread import spread


def readable_seconds(seconds: float) -> str:
    """A time in seconds, or in milliseconds below one, with three digits."""
    value, unit = (seconds, "s") if seconds >= 1 else (1000 * seconds, "ms")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


class Row(NamedTuple):
    """The result of a case.

    Attributes:
        model, size: None where they make no difference; size is width and height in pixels.
        measured: None where the case was refused.
        agrees: False where the results are further apart than rounding explains.
        remark: why nothing was measured, or nothing of diffusers.
    """

    case: str
    model: str | None
    size: tuple[int, int] | None
    batch: int
    measured: Measured | None = None
    agrees: bool = True
    remark: str | None = None

    @property
    def size_text(self) -> str:
        """Such as "1024x768", or nothing."""
        return "x".join(map(str, self.size or ()))

    @property
    def title(self) -> str:
        """What it is of."""
        return ", ".join(part for part in (self.case, self.model, self.size_text, f"batch {self.batch}") if part)

    @property
    def summary(self) -> str:
        """What came out."""
        parts = []
        if self.measured is not None:
            sides = {"ours": self.measured.ours, "diffusers": self.measured.theirs}
            parts = [f"{name} {readable_seconds(spread(side.seconds).median)}" for name, side in sides.items() if side]
        return ", ".join([*parts, *([self.remark] if self.remark else [])])
