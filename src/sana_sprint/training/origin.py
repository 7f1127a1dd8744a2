"""What training at full size starts from: a checkpoint's transformer, the pipeline it is in, and a cache of latents."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.hub import find_source
from sana_sprint.checkpoints.reader import CONFIG_FILE, PIPELINE_FILE
from sana_sprint.training.datasets.cached import CachedLatents
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.transformer.model import SanaTransformer2DModel

logger = logging.getLogger(__name__)

QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True)
class Origin:
    """Where a transformer in diffusers' layout lies."""

    transformer: Path
    pipeline: Path | None  # None for a transformer alone

    @classmethod
    def in_folder(cls, folder: Path) -> "Origin":
        """That of a folder: a pipeline's or a transformer's.

        Raises:
            ValueError: if it is neither.
        """
        transformer = folder / "transformer"
        if (folder / PIPELINE_FILE).is_file() and (transformer / CONFIG_FILE).is_file():
            return cls(transformer, folder)
        if (folder / CONFIG_FILE).is_file():
            return cls(folder, None)
        raise ValueError(
            f"{folder} is neither a pipeline nor a transformer in diffusers' layout: it holds no {CONFIG_FILE}, and no"
            f" {PIPELINE_FILE} with a transformer"
        )

    @classmethod
    def find(cls, name: str) -> "Origin":
        """That of a folder, or of a repository on the hub, which is fetched.

        Raises:
            ValueError: if what is there is neither a pipeline nor a transformer.
            OSError: if there is no such folder or repository.
        """
        return cls.in_folder(find_source(name))

    def config(self) -> dict[str, Any]:
        """The transformer's."""
        return dict(SanaTransformer2DModel.load_config(self.transformer))

    def load(self) -> SanaTransformer2DModel:
        """The transformer, in float32."""
        return SanaTransformer2DModel.from_pretrained(self.transformer, torch_dtype=torch.float32)


def with_norms(transformer: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The same transformer with normalised queries and keys; norms it lacks start at one, and a warning says so."""
    if transformer.config.qk_norm is not None:
        return transformer
    normalised = SanaTransformer2DModel.from_config(transformer.config, qk_norm=QK_NORM)
    missing, unexpected = normalised.load_state_dict(transformer.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith((".norm_q.weight", ".norm_k.weight")) for name in missing)
    logger.warning("the transformer has no norms of queries and keys: %d new ones start at one", len(missing))
    return normalised.to(transformer.device)


def open_cache(folder: Path | None, captions: CaptionChoice, transformer: SanaTransformer2DModel) -> CachedLatents:
    """The cache of latents that a transformer is trained on.

    Raises:
        ValueError: if there is no cache, or it is one for other networks.
    """
    if folder is None:
        raise ValueError("there is no data: give --set data=FOLDER, a cache that sana-sprint cache-latents has written")
    cache = CachedLatents(folder, captions)
    found, wanted = cache.empty.shape[-1], transformer.config.caption_channels
    if found != wanted:
        raise ValueError(f"the transformer reads text features of width {wanted}, those in {folder} have {found}")
    if cache.skipped:
        first = cache.skipped.lines()[0]
        logger.warning("%d of what is in %s cannot be read, and is left out: %s", len(cache.skipped), folder, first)
    return cache
