"""How a cache of latents and text features lies on disk: the names of its files, and what they were made from.

A cache is a folder of tar shards. Every example has its latents (.npy, C h w), the features of each of its captions
(.text0.npy, .text1.npy, .., tokens and width), and .json with its name, captions and scores; for a ControlNet, also the
latents of the picture's edges, or whatever that is shown (.control.npy, C h w). Arrays are float16: every library reads
it, latents are of unit size and need its 11 bits more than bfloat16's range, and what a text encoder computes in
bfloat16 fits in without loss.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sana_sprint.training.datasets.records import Record

FORMAT_VERSION = 1
_DESCRIPTION, _EMPTY = "cache.json", "empty.npy"


def text_ending(place: int) -> str:
    """Of the file with the features of one of an example's captions."""
    return f"text{place}.npy"


def empty_text_path(folder: Path) -> Path:
    """The features of the empty caption, which are kept once."""
    return folder / _EMPTY


def skipped_path(folder: Path, part: int, parts: int) -> Path:
    """Where one of several processes lists what it skipped."""
    return folder / f"skipped-{part}-of-{parts}.txt"


def source_fingerprint(records: Iterable[Record]) -> str:
    """Sixteen hex digits that change with the names of the examples, the sizes of their files, and their metadata."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.name} {record.num_bytes} {record.fields}\n".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """What a cache was made from: two runs that agree on it write the same files."""

    model: str  # fingerprint
    source: str  # fingerprint
    num_examples: int
    examples_per_shard: int
    size: int  # pixels, of the square picture
    captions_tokens: int
    dtype: str
    control: str | None = None  # what a ControlNet is shown of each picture
    format: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.examples_per_shard)

    def examples_of(self, shard: int) -> range:
        """The examples of the source that are in a shard, but for those that cannot be read."""
        first = shard * self.examples_per_shard
        return range(first, min(first + self.examples_per_shard, self.num_examples))

    def shard_path(self, folder: Path, shard: int) -> Path:
        return folder / f"latents-{shard:06d}-of-{self.num_shards:06d}.tar"

    @classmethod
    def read(cls, folder: Path) -> "CacheDescription":
        """That of a cache.

        Raises:
            ValueError: if the folder is no cache, or one of another format.
        """
        path = folder / _DESCRIPTION
        if not path.is_file():
            raise ValueError(f"{folder} is no cache of latents: it holds no {_DESCRIPTION}")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT_VERSION:
            raise ValueError(f"{path} must be of format {FORMAT_VERSION}, got {content.get('format')}")
        return cls(**content)

    def claim(self, folder: Path, part: int) -> None:
        """Make a folder the cache of this description, unless it is already.

        Args:
            folder: Made if missing.
            part: The number of this process among those that may do so at the same time.

        Raises:
            ValueError: if it is the cache of another one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _DESCRIPTION
        if not path.exists():
            own = path.with_name(f".{_DESCRIPTION}.{part}")
            own.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            own.replace(path)
        found, wanted = asdict(self.read(folder)), asdict(self)
        changed = [name for name in wanted if found[name] != wanted[name]]
        if changed:
            raise ValueError(
                f"{folder} is a cache made with other settings ({', '.join(changed)}); choose another output folder or"
                " remove it"
            )
