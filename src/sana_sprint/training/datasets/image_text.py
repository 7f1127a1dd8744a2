"""Shards or a folder of pictures with captions to examples: one by one, or in batches of one size.

H W pixels, C channels, h w latent grid.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from diffusers.image_processor import PixArtImageProcessor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from sana_sprint.pictures import decode_picture
from sana_sprint.training.datasets.arrays import array_shape, read_array
from sana_sprint.training.datasets.captions import Captions, read_captions
from sana_sprint.training.datasets.folders import folder_records
from sana_sprint.training.datasets.order import BucketOrder, first_good, read_part
from sana_sprint.training.datasets.pictures import fit_picture, picture_size
from sana_sprint.training.datasets.records import CONTENT_ENDINGS, LATENT_ENDING, Record, Span
from sana_sprint.training.datasets.shards import shard_records
from sana_sprint.training.datasets.skipped import Skipped
from sana_sprint.training.draws import Draws

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class ImageTextExample:
    """A picture or its latents, and its captions."""

    name: str
    content: np.ndarray  # H W 3 uint8 for a picture, C h w floats for latents times the scaling factor
    captions: Captions

    @property
    def is_latent(self) -> bool:
        return self.content.dtype != np.uint8


def find_records(source: Path, skipped: Skipped) -> list[Record]:
    """The examples of a shard, of all shards below a folder, or of pictures below a folder, always in the same order.

    Raises:
        FileNotFoundError: if there is no such shard or folder.
        ValueError: if that holds no examples.
        ImportError: if there are shards, and webdataset is not installed.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or shard {source}")
    folder = source if source.is_dir() else source.parent
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    for path in paths:
        if path.name.endswith(_COMPRESSED):
            skipped.add(path.relative_to(folder).as_posix(), "compressed shards cannot be read in any order; unpack it")
    shards = [path for path in paths if path.suffix == ".tar"]
    if shards:
        bar = tqdm(shards, desc="listing", unit="shard", dynamic_ncols=True, disable=None, leave=False)
        records = [
            record for path in bar for record in shard_records(path, path.relative_to(folder).as_posix(), skipped)
        ]
    else:
        records = folder_records(source, skipped) if source.is_dir() else []
    if not records:
        reason = next(iter(skipped.lines()), "it holds neither .tar shards nor pictures")
        raise ValueError(f"no examples in {source}: {reason}")
    return records


def _content(record: Record) -> Span:
    if record.ending is None:
        raise ValueError(f"has neither a picture nor latents; those end in {', '.join(CONTENT_ENDINGS)}")
    return record.files[record.ending]


class ImageTextDataset(Dataset[ImageTextExample]):
    """Pictures with captions, from tar shards or a folder, cut to the sizes that a model is trained on.

    A shard holds, for every key, a picture (.png, .jpg, .jpeg, .webp) or its latents (.npy, C h w, times the
    autoencoder's scaling factor, which are taken as they are), and captions in .json or .txt. A folder holds the same
    as single files, or pictures that a metadata.jsonl or metadata.csv lists.

    What is damaged is skipped: `skipped` says what and why. Examples are numbered in the order of their names; in which
    order they are trained on follows from a seed (`batch`).

    Args:
        source: A shard or a folder.
        bins: The sizes of pictures: aspect ratio (height / width) to height and width in pixels. A picture gets the one
            with the nearest ratio.

    Raises:
        FileNotFoundError: if there is no such shard or folder.
        ValueError: if that holds no examples.
        ImportError: if there are shards, and webdataset is not installed.
    """

    def __init__(self, source: Path, bins: Mapping[str, Sequence[float]]) -> None:
        self.source = source
        self.bins = bins
        self.skipped = Skipped()
        self.records = find_records(source, self.skipped)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageTextExample:
        """An example, or the next good one.

        Raises:
            IndexError: for a number that no example has.
            ValueError: if no example can be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"examples have numbers from 0 to {len(self) - 1}, got {index}")
        found = first_good(chain(range(index, len(self)), range(index)), self.attempt)
        if found is None:
            raise ValueError(f"none of {len(self)} examples can be read: {self.skipped.lines()[0]}")
        return found[1]

    def attempt(self, index: int) -> ImageTextExample | None:
        """An example; None, and a note in `skipped`, if it cannot be read."""
        record = self.records[index]
        return self.skipped.attempt(record.name, self._read, record)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=dict(self.bins))

    def _read(self, record: Record) -> ImageTextExample:
        captions, span = read_captions(record), _content(record)
        if record.ending == LATENT_ENDING:
            return ImageTextExample(record.name, read_array(span, 3), captions)
        picture = decode_picture(span.read())
        return ImageTextExample(record.name, fit_picture(picture, *self._size(picture.height, picture.width)), captions)

    def _bucket(self, record: Record) -> tuple[int, ...]:
        """Shape that the example will have, from its header alone."""
        span = _content(record)
        return array_shape(span) if record.ending == LATENT_ENDING else self._size(*picture_size(span))

    @cached_property
    def order(self) -> BucketOrder:
        """All examples by the shape that they will have; the header of each is read for it."""
        bar = tqdm(self.records, desc="reading sizes", unit="picture", dynamic_ncols=True, disable=None, leave=False)
        buckets: list[Hashable] = [self.skipped.attempt(record.name, self._bucket, record) for record in bar]
        return BucketOrder(buckets)

    def batch(self, draws: Draws) -> list[ImageTextExample]:
        """The examples of a part of a step, all of one shape.

        Raises:
            ValueError: if no example can be read.
        """
        return [example for _, example in read_part(self.order, lambda place, index: self.attempt(index), draws)]
