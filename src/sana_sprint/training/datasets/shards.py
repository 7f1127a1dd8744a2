"""WebDataset tar shards to records that are read in any order, and examples to such shards."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from sana_sprint.training.datasets.records import Record, Span
from sana_sprint.training.datasets.skipped import Skipped


def _webdataset() -> ModuleType:
    try:
        import webdataset.tariterators
    except ImportError as error:
        raise ImportError("tar shards need webdataset: pip install 'sana-sprint[train]'") from error
    return webdataset


def _members(path: Path, name: str, skipped: Skipped) -> Iterator[tarfile.TarInfo]:
    """Those of a shard up to where it is damaged, if it is."""
    end = 0
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                blocks = -(-member.size // tarfile.BLOCKSIZE)
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
                yield member
    except (tarfile.TarError, OSError) as error:
        skipped.add(name, f"no intact tar file without compression: {error}")
        return
    # tarfile takes a damaged header for the end of the archive; the real end is marked by zeros.
    with path.open("rb") as stream:
        stream.seek(end)
        mark = stream.read(tarfile.BLOCKSIZE)
    if mark != bytes(tarfile.BLOCKSIZE):
        skipped.add(name, f"damaged or cut off after {end} bytes; what stands before that is read")


def shard_records(path: Path, name: str, skipped: Skipped) -> list[Record]:
    """The examples of a shard, in its order: what is before the first dot of a member's name is the key.

    Args:
        path: The tar file, not compressed, for its members are read one by one.
        name: Of the shard, for messages.
        skipped: Where damage is noted.

    Raises:
        ImportError: if webdataset is not installed.
    """
    split_name = _webdataset().tariterators.base_plus_ext
    examples: dict[str, dict[str, Span]] = {}
    for member in _members(path, name, skipped):
        key, ending = split_name(member.name)
        if member.isreg() and key:
            examples.setdefault(key, {})[ending.lower()] = Span(path, member.offset_data, member.size)
    return [Record(f"{name}:{key}", files) for key, files in examples.items()]


def write_shard(path: Path, examples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write examples, each a key and its files by ending, as a shard. The same examples give the same bytes.

    Raises:
        ImportError: if webdataset is not installed.
    """
    writer = _webdataset().TarWriter
    with path.open("wb") as stream, writer(stream, encoder=False, mtime=0) as shard:
        for key, files in examples:
            shard.write({"__key__": key, **files})
