"""Pictures, shards and folders in small, written by Pillow and webdataset themselves, and a place in training."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

# Landscape, square and portrait for a model of 64 pixels: its sizes are multiples of 8.
BINS = {"0.5": [48.0, 96.0], "1.0": [64.0, 64.0], "2.0": [96.0, 48.0]}
# Pictures that fall into them, in turn.
SIZES = [(40, 80), (70, 64), (90, 45)]


@pytest.fixture
def bins():
    return BINS


@pytest.fixture
def place():
    """Makes the draws of a part of a step."""
    from sana_sprint.training.draws import Draws

    def make(step: int, size: int = 2, part: int = 0, parts: int = 1) -> Draws:
        return Draws.of_step(7, step, size, part, parts)

    return make


@pytest.fixture
def picture():
    """Makes the bytes of a picture of random dots."""

    def make(height: int, width: int, seed: int = 0, format: str = "PNG") -> bytes:
        dots = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(dots).save(stream, format)
        return stream.getvalue()

    return make


@pytest.fixture
def examples(picture):
    """Makes the files of so many examples by key; their pictures fall into the bins in turn."""

    def make(count: int) -> dict[str, dict[str, bytes]]:
        return {
            f"{number:03d}": {
                "png": picture(*SIZES[number % 3], number),
                "json": json.dumps({"prompt": f"a red circle {number}"}).encode(),
            }
            for number in range(count)
        }

    return make


@pytest.fixture
def write_tar():
    """Writes examples as a WebDataset shard."""

    def write(path: Path, examples: Mapping[str, Mapping[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as shard:
            for key, files in examples.items():
                shard.write({"__key__": key, **files})
        return path

    return write


@pytest.fixture
def write_files():
    """Writes examples as single files below a folder."""

    def write(folder: Path, examples: Mapping[str, Mapping[str, bytes]]) -> Path:
        for key, files in examples.items():
            for ending, content in files.items():
                path = folder / f"{key}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder

    return write


@pytest.fixture
def array():
    """Makes the bytes of a .npy file."""

    def make(values: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, values)
        return stream.getvalue()

    return make


@pytest.fixture(scope="session")
def encoder(tiny_pipeline_parts):
    """The encoders of the tiny pipeline."""
    import torch

    from sana_sprint.training.datasets.encoding import ExampleEncoder

    return ExampleEncoder(
        **{name: tiny_pipeline_parts[name] for name in ("vae", "tokenizer", "text_encoder")},
        device=torch.device("cpu"),
        dtype=torch.float32,
        captions_tokens=40,
    )


@pytest.fixture
def make_cache(encoder, bins):
    """Makes a cache of a source; returns its folder."""
    from sana_sprint.training.datasets.caching import CacheSettings, cache_latents
    from sana_sprint.training.datasets.image_text import ImageTextDataset

    def make(source: Path, folder: Path, **settings) -> Path:
        wanted = {"model": "tiny", "size": 64, "examples_per_shard": 4, "batch_size": 2, **settings}
        cache_latents(ImageTextDataset(source, bins), encoder, folder, CacheSettings(**wanted))
        return folder

    return make
