"""A seed to training material: rendered pictures with captions, kept in memory and cached on disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from sana_sprint.files import write_whole
from sana_sprint.shapes.renderer import render
from sana_sprint.shapes.sampler import Example, draw_example
from sana_sprint.training.draws import Draws


@dataclass(frozen=True)
class PicturePool:
    """Pictures (M, size, size, 3) uint8 with a caption each."""

    pictures: np.ndarray
    captions: list[str]

    def batch(self, draws: Draws) -> torch.Tensor:
        """Random pictures as (B, 3, size, size) float32 in [-1, 1], mirrored left to right half of the time.

        Mirroring contradicts captions that name sides, so this is for training without captions.
        """
        chosen = self.pictures[draws.integers(len(self.pictures)).numpy(force=True)]
        is_mirrored = draws.uniform((1, 1, 1)).numpy(force=True) < 0.5
        mirrored = np.where(is_mirrored, chosen[:, :, ::-1], chosen)
        return to_tensor(mirrored).to(draws.device)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Pictures (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1] to pictures (B, H, W, 3) uint8."""
    rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).cpu().numpy()


def pool_examples(num_pictures: int, seed: int) -> Iterator[Example]:
    """The training examples whose pictures are a pool, in its order."""
    rng = np.random.default_rng(seed)
    return (draw_example(rng) for _ in range(num_pictures))


def picture_pool(folder: Path, num_pictures: int, size: int, seed: int) -> PicturePool:
    """Render `num_pictures` training examples, or read them from `folder` where an earlier call left them."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"pictures-{num_pictures}-{size}px-seed{seed}"
    pictures_path, captions_path = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not captions_path.exists():
        pictures, captions = np.empty((num_pictures, size, size, 3), np.uint8), []
        examples = pool_examples(num_pictures, seed)
        bar = tqdm(examples, total=num_pictures, desc="rendering", unit="picture", dynamic_ncols=True, disable=None)
        for index, example in enumerate(bar):
            pictures[index] = render(example.scene, size)
            captions.append(example.caption)
        np.save(pictures_path, pictures)
        write_whole(captions_path, lambda partial: partial.write_text(json.dumps(captions), encoding="utf-8"))
    return PicturePool(np.load(pictures_path), json.loads(captions_path.read_text(encoding="utf-8")))
