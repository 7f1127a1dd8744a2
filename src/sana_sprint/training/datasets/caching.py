"""Pictures with captions to a cache of their latents and text features, on which training runs without encoders.

A run that was killed goes on where it stopped: shards are there whole or not at all, and those that are there stay.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

from sana_sprint.conditioning.table import control_named
from sana_sprint.files import write_whole
from sana_sprint.training.datasets.arrays import is_finite, to_bytes
from sana_sprint.training.datasets.cache_files import (
    CacheDescription,
    empty_text_path,
    skipped_path,
    source_fingerprint,
    text_ending,
)
from sana_sprint.training.datasets.encoding import ExampleEncoder
from sana_sprint.training.datasets.image_text import ImageTextDataset, ImageTextExample
from sana_sprint.training.datasets.records import CONTROL_ENDING, LATENT_ENDING
from sana_sprint.training.datasets.shards import write_shard
from sana_sprint.training.datasets.skipped import Skipped

T = TypeVar("T")
Numbered = tuple[int, ImageTextExample]

_READ_AHEAD = 32  # examples
_TRIAL = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)  # a picture


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How a cache is made.

    Attributes:
        model: What tells the encoders from others; a cache is never continued with another.
        size: Of the square picture, in pixels.
        examples_per_shard: About half a megabyte each, at 1024 pixels.
        batch_size: Pictures, and captions, that are encoded at once.
        control: What a ControlNet is shown of each picture, one of `conditioning.table.CONTROLS`, for its latents; None
            for nothing.
        part, parts: Which of several processes this is; each makes shards of its own.
    """

    model: str
    size: int
    examples_per_shard: int = 500
    batch_size: int = 8
    control: str | None = None
    part: int = 0
    parts: int = 1


@dataclass
class CacheReport:
    """What a run has done; numbers of examples."""

    skipped: Skipped
    num_written: int = 0
    num_present: int = 0  # in shards that earlier runs left
    num_cut: int = 0  # captions that were too long


def _read_ahead(read: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """What `read` returns, in order; files are read and decoded while the caller computes."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor() as pool:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(examples: Iterable[Numbered], size: int) -> Iterator[list[Numbered]]:
    """Examples in batches of at most `size` that can be stacked."""
    waiting: dict[tuple[bool, tuple[int, ...]], list[Numbered]] = {}
    for numbered in examples:
        bucket = (numbered[1].is_latent, numbered[1].content.shape)
        batch = waiting.setdefault(bucket, [])
        batch.append(numbered)
        if len(batch) == size:
            yield waiting.pop(bucket)
    yield from waiting.values()


def _save_skipped(path: Path, skipped: Skipped) -> None:
    """Add to the list of what was skipped, which earlier runs may have begun."""
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = sorted({*known, *skipped.lines()})
    if lines:
        write_whole(path, lambda unfinished: unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8"))


class _ShardMaker:
    """The examples of one shard after the other, read, encoded and as files."""

    def __init__(self, dataset: ImageTextDataset, encoder: ExampleEncoder, settings: CacheSettings) -> None:
        self.dataset = dataset
        self.encoder = encoder
        self.batch_size = settings.batch_size
        self.control = None
        if settings.control is not None:
            self.control = control_named(settings.control, encoder.vae.device)
            self.control(_TRIAL)  # what it lacks is said before anything is written
        self.report = CacheReport(dataset.skipped)

    def write(self, indices: range, bar: tqdm, list_path: Path, path: Path) -> None:
        """Write a shard, then add what was skipped to its list: to be seen when the shard is, and never later."""
        write_shard(path, self.files(indices, bar))
        _save_skipped(list_path, self.report.skipped)

    def files(self, indices: range, bar: tqdm) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and files of every example that can be read; moves the bar on for every one that was tried."""
        for batch in _batches(self._readable(indices, bar), self.batch_size):
            encoded = zip(batch, self._latents(batch), self._texts(batch), self._controls(batch), strict=True)
            for (index, example), latent, texts, control in encoded:
                bar.update()
                if not all(map(is_finite, [latent, *texts, *control.values()])):
                    self.report.skipped.add(example.name, "its encoding holds numbers that are not finite in float16")
                    continue
                self.report.num_written += 1
                described = {
                    "name": example.name,
                    "captions": example.captions.texts,
                    "scores": example.captions.scores,
                }
                yield (
                    f"{index:09d}",
                    {
                        LATENT_ENDING: to_bytes(latent),
                        **{ending: to_bytes(array) for ending, array in control.items()},
                        **{text_ending(place): to_bytes(text) for place, text in enumerate(texts)},
                        "json": json.dumps(described, ensure_ascii=False).encode(),
                    },
                )

    def _readable(self, indices: range, bar: tqdm) -> Iterator[Numbered]:
        channels = self.encoder.vae.config.latent_channels
        for index, example in zip(indices, _read_ahead(self.dataset.attempt, indices), strict=True):
            if example is not None and example.is_latent and len(example.content) != channels:
                shape = "x".join(map(str, example.content.shape))
                self.report.skipped.add(example.name, f"latents must have {channels} channels, got {shape}")
                example = None
            if example is not None and example.is_latent and self.control is not None:
                self.report.skipped.add(example.name, "holds latents, and nothing can be drawn after those")
                example = None
            if example is None:
                bar.update()
            else:
                yield index, example

    def _latents(self, batch: list[Numbered]) -> np.ndarray:
        """(B, C, h, w) float16."""
        contents = [example.content for _, example in batch]
        if not batch[0][1].is_latent:
            return self.encoder.latents(contents)
        with np.errstate(over="ignore"):  # noticed as not finite
            return np.stack(contents).astype(np.float16)

    def _controls(self, batch: list[Numbered]) -> list[dict[str, np.ndarray]]:
        """What a ControlNet is shown of each example, if anything: latents (C, h, w) by the ending of their file."""
        if self.control is None:
            return [{} for _ in batch]
        drawings = [np.asarray(self.control(example.content)) for _, example in batch]
        return [{CONTROL_ENDING: latent} for latent in self.encoder.latents(drawings)]

    def _texts(self, batch: list[Numbered]) -> list[list[np.ndarray]]:
        """The features of all captions of each example."""
        captions = [text for _, example in batch for text in example.captions.texts]
        features: list[np.ndarray] = []
        for start in range(0, len(captions), self.batch_size):
            found, num_cut = self.encoder.texts(captions[start : start + self.batch_size])
            features += found
            self.report.num_cut += num_cut
        each = iter(features)
        return [[next(each) for _ in example.captions.texts] for _, example in batch]


def _check_sizes(dataset: ImageTextDataset, encoder: ExampleEncoder) -> None:
    ratio = encoder.vae.spatial_compression_ratio
    for height, width in dataset.bins.values():
        if height % ratio or width % ratio:
            raise ValueError(f"picture sizes must be multiples of {ratio}, got {height:.0f}x{width:.0f}")


def cache_latents(
    dataset: ImageTextDataset, encoder: ExampleEncoder, output: Path, settings: CacheSettings
) -> CacheReport:
    """Encode what is not in the cache yet, and write it there shard by shard.

    Args:
        dataset: What to encode. Latents in it are taken as they are.
        encoder: A pipeline's encoders.
        output: The folder of the cache, made if missing.
        settings: How.

    Raises:
        ValueError: if `output` is a cache that was made in another way or from something else, if the pictures' sizes
            do not fit the autoencoder, for an unknown control, or if nothing could be read.
        ImportError: if the control needs a package that is not installed.
    """
    _check_sizes(dataset, encoder)
    maker = _ShardMaker(dataset, encoder, settings)
    description = CacheDescription(
        model=settings.model,
        source=source_fingerprint(dataset.records),
        num_examples=len(dataset),
        examples_per_shard=settings.examples_per_shard,
        size=settings.size,
        captions_tokens=encoder.captions_tokens,
        dtype=str(encoder.dtype).removeprefix("torch."),
        control=settings.control,
    )
    description.claim(output, settings.part)
    if settings.part == 0 and not empty_text_path(output).exists():
        content = to_bytes(encoder.empty_text())
        write_whole(empty_text_path(output), lambda unfinished: unfinished.write_bytes(content))

    report, written = maker.report, []
    list_path = skipped_path(output, settings.part, settings.parts)
    shards = range(settings.part, description.num_shards, settings.parts)
    total = sum(len(description.examples_of(shard)) for shard in shards)
    with tqdm(total=total, desc="encoding", unit="picture", dynamic_ncols=True, disable=None) as bar:
        for shard in shards:
            path, indices = description.shard_path(output, shard), description.examples_of(shard)
            if path.exists():
                report.num_present += len(indices)
                bar.update(len(indices))
                continue
            write_whole(path, partial(maker.write, indices, bar, list_path))
            written.append(path)
    if total and not report.num_written + report.num_present:
        for path in written:
            path.unlink()
        raise ValueError(f"none of {total} examples can be read; the first: {report.skipped.lines()[0]}")
    return report
