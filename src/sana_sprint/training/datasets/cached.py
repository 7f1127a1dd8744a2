"""A cache of latents and text features to the batches of any step.

B examples of one process, C channels, h w latent grid, L tokens of the longest text in a batch.
"""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from sana_sprint.training.datasets.arrays import array_shape, read_array
from sana_sprint.training.datasets.cache_files import CacheDescription, empty_text_path, text_ending
from sana_sprint.training.datasets.captions import CaptionChoice, read_captions
from sana_sprint.training.datasets.order import BucketOrder, first_good, places, read_part
from sana_sprint.training.datasets.records import CONTROL_ENDING, LATENT_ENDING, Record, Span
from sana_sprint.training.datasets.shards import shard_records
from sana_sprint.training.datasets.skipped import Skipped
from sana_sprint.training.datasets.source import LatentBatch
from sana_sprint.training.draws import Draws

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ALL_ALIKE = CaptionChoice()


class CachedLatents:
    """A `LatentSource` on what `cache_latents` has written.

    A batch holds latents of one shape. What is damaged is skipped, and the next good example takes its place: `skipped`
    says what and why. `control` says what a ControlNet is shown of each picture, None for nothing.

    Args:
        folder: Of the cache, finished.
        choice: How one of several captions is drawn.
        device: Of the batches.

    Raises:
        ValueError: if the folder is no cache, an unfinished one, or one of which nothing can be read.
        ImportError: if webdataset is not installed.
    """

    def __init__(self, folder: Path, choice: CaptionChoice = _ALL_ALIKE, device: torch.device | str = "cpu") -> None:
        description = CacheDescription.read(folder)
        self.description = description
        self.control = description.control
        paths = [description.shard_path(folder, shard) for shard in range(description.num_shards)]
        missing = [path for path in [empty_text_path(folder), *paths] if not path.is_file()]
        if missing:
            raise ValueError(
                f"the cache {folder} is not finished, {missing[0].name} is missing: run cache-latents again, which goes"
                " on where it stopped"
            )
        self.choice = choice
        self.device = torch.device(device)
        self.skipped = Skipped()
        bar = tqdm(paths, desc="listing", unit="shard", dynamic_ncols=True, disable=None, leave=False)
        self.records = [record for path in bar for record in shard_records(path, path.name, self.skipped)]
        self.order = BucketOrder(
            [self.skipped.attempt(f"{record.name}.{LATENT_ENDING}", _latent_shape, record) for record in self.records]
        )
        self._num_listed = len(self.skipped)  # of what was skipped
        self.empty = torch.from_numpy(read_array(Span.whole(empty_text_path(folder)), 2))

    def __len__(self) -> int:
        return len(self.records)

    def to(self, device: torch.device) -> "CachedLatents":
        """The same source, with its batches on a device."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def identity(self) -> str:
        """Changes with what the cache was made from and with how a caption is drawn, not with where the cache lies."""
        return hashlib.sha256(f"{self.description} {self.choice}".encode()).hexdigest()[:16]

    def empty_caption(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, K, width) and mask (B, K) of the empty caption, `size` times."""
        return self._padded([self.empty] * size)

    def batch(self, draws: Draws, caption_dropout: float = 0.0, misaligned: bool = False) -> LatentBatch:
        """This process's part of a step's batch, all latents of one shape.

        Raises:
            ValueError: if nothing can be read, or misaligned pairs are asked of a single example.
        """
        size = draws.size * draws.parts
        caption_draws, is_dropped = draws.rng.random(size), draws.rng.random(size) < caption_dropout
        found = read_part(self.order, lambda place, index: self._attempt(index, caption_draws[place]), draws)
        kinds = zip(*(arrays for _, (arrays, _) in found), strict=True)
        clean, *controls = (torch.from_numpy(np.stack(arrays)).to(self.device).float() for arrays in kinds)
        control = controls[0] if controls else None
        texts = [self.empty if is_dropped[place] else text for place, (_, (_, text)) in zip(places(draws), found)]
        if not misaligned:
            return LatentBatch(clean, *self._padded(texts), control=control)

        wrong_draws, offsets = draws.rng.random(size), draws.rng.random(size)
        wrong = [
            self._other_text(index, offsets[place], wrong_draws[place])
            for place, (index, _) in zip(places(draws), found)
        ]
        embeds, mask = self._padded([*texts, *wrong])
        (caption, wrong_caption), (mask, wrong_mask) = embeds.chunk(2), mask.chunk(2)
        return LatentBatch(clean, caption, mask, wrong_caption, wrong_mask, control)

    def _attempt(self, index: int, draw: float) -> tuple[list[np.ndarray], torch.Tensor] | None:
        """Latents (C, h, w), those of the control behind the picture's, and text features."""
        endings = (LATENT_ENDING, CONTROL_ENDING) if self.control else (LATENT_ENDING,)
        read = [self._array(self.records[index], ending, 3) for ending in endings]
        arrays, text = [array for array in read if array is not None], self._text(index, draw)
        return None if text is None or len(arrays) < len(endings) else (arrays, text)

    def _text(self, index: int, draw: float) -> torch.Tensor | None:
        """Features (tokens, width) of one of an example's captions."""
        record, place = self.records[index], 0
        if text_ending(1) in record.files:
            captions = self._read(f"{record.name}.json", lambda: read_captions(record))
            if captions is None:
                return None
            place = self.choice.choose(captions.scores, draw)
        features = self._array(record, text_ending(place), 2)
        return None if features is None else torch.from_numpy(features)

    def _array(self, record: Record, ending: str, num_dimensions: int) -> np.ndarray | None:
        # Each file by itself, so that what a step gets does not depend on the damage that earlier ones have met.
        return self._read(f"{record.name}.{ending}", lambda: read_array(record.files[ending], num_dimensions))

    def _read(self, name: str, read: Callable[[], T]) -> T | None:
        """What `read` returns; None if it fails, which is told the first time."""
        known = len(self.skipped)
        found = self.skipped.attempt(name, read)
        if known == self._num_listed < len(self.skipped):
            reason = self.skipped.reasons[name]
            logger.warning("%s cannot be read, and is left out, as will be whatever else cannot: %s", name, reason)
        return found

    def _other_text(self, index: int, offset: float, draw: float) -> torch.Tensor:
        """A caption of another example, which lies `offset` (from 0 to 1) of the way round from this one."""
        found = first_good(self._others(index, offset), lambda other: self._text(other, draw))
        if found is None:
            raise ValueError(
                "misaligned pairs need the caption of a second example, and there is none that can be read"
            )
        return found[1]

    def _others(self, index: int, offset: float) -> Iterator[int]:
        num_others = len(self) - 1
        first = int(offset * num_others)
        return ((index + 1 + (first + further) % num_others) % len(self) for further in range(num_others))

    def _padded(self, texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, L, width) in float32 and mask (B, L) of texts (tokens, width)."""
        embeds = pad_sequence(texts, batch_first=True).to(self.device).float()
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        return embeds, (torch.arange(embeds.shape[1], device=self.device) < lengths[:, None]).long()


def _latent_shape(record: Record) -> tuple[int, ...]:
    """From the header; damage elsewhere shows when the example is read."""
    if LATENT_ENDING not in record.files or text_ending(0) not in record.files:
        raise ValueError("has no latents or no text features")
    return array_shape(record.files[LATENT_ENDING])
