"""Where the bytes of an example lie: in files of its own, or in the middle of a shard."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

LATENT_ENDING = "npy"
CONTROL_ENDING = "control.npy"  # latents of what a ControlNet is shown of a picture
# Of what is learned from, in the order of preference, where an example has several.
CONTENT_ENDINGS = (LATENT_ENDING, "png", "jpg", "jpeg", "webp")


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a file; `offset` and `size` are in bytes."""

    path: Path
    offset: int
    size: int

    @classmethod
    def whole(cls, path: Path) -> "Span":
        """All of a file."""
        return cls(path, 0, path.stat().st_size)

    def read(self) -> bytes:
        """Its content.

        Raises:
            ValueError: if the file ends before it.
        """
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"cut off after {len(content)} of {self.size} bytes")
        return content


@dataclass(frozen=True, slots=True)
class Record:
    """An example that has not been read yet.

    Attributes:
        name: For messages: the picture's path, or "shard.tar:key".
        files: By ending, in lower case and without the dot.
        fields: What a table of metadata says of it, if there is one.
    """

    name: str
    files: dict[str, Span]
    fields: dict[str, Any] | None = None

    @property
    def ending(self) -> str | None:
        """That of its picture or latents; None if it has neither."""
        return next((ending for ending in CONTENT_ENDINGS if ending in self.files), None)

    @property
    def num_bytes(self) -> int:
        return sum(span.size for span in self.files.values())
