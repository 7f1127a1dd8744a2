"""Things that may be damaged to those that are not, and a list of the others with the reasons."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Skipped:
    """What could not be read: names, each with the reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: object) -> None:
        """Note that something is left out, and why."""
        self.reasons[name] = " ".join(str(reason).split()) or type(reason).__name__

    def attempt(self, name: str, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `read` returns; None and a note if it fails, and None at once if this name was noted before."""
        if name in self.reasons:
            return None
        try:
            return read(*args, **kwargs)
        except MemoryError:
            raise  # no fault of the file
        # No list of classes is complete: a damaged PNG alone gives OSError, SyntaxError, struct.error and zlib.error.
        except Exception as error:
            self.add(name, error)
            return None

    def lines(self) -> list[str]:
        """One "name: reason" for each, by name."""
        return [f"{name}: {reason}" for name, reason in sorted(self.reasons.items())]
