"""Pictures and their captions to CLIP scores.

B pictures with a caption each.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

from sana_sprint.evaluation.batches import batched


class ClipScorer:
    """How well pictures match captions, in the eyes of a CLIP: 100 max(cos, 0), between 0 and 100.

    The score of Hessel et al. (arXiv 2104.08718) with the factor 100 that tables of text-to-image models have. Scores
    of one CLIP are comparable; SANA's are of OpenAI's ViT-L/14 (openai/clip-vit-large-patch14).

    Args:
        name: A folder, or the id of a model on the hub, which is fetched.
        device: Where it computes.

    Raises:
        ValueError: if what is there is no CLIP.
        OSError: if there is nothing.
    """

    def __init__(self, name: str | Path, device: str | torch.device = "cpu") -> None:
        # An annotation, because transformers declares no second result.
        found: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        model, loaded = found
        # transformers would go on with random weights in their place.
        if loaded["missing_keys"]:
            raise ValueError(f"{name} is no CLIP: {len(loaded['missing_keys'])} of a CLIP's weights are not in it")
        self.model = model.eval().to(device)
        # Pillow resizes as the CLIP was trained. Torchvision, where it is installed, gives slightly other pixels.
        self.processor = CLIPProcessor.from_pretrained(name, backend="pil")

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """Pictures (H, W, 3) uint8, of any sizes, to scores (B,); a caption longer than the CLIP reads is cut.

        Raises:
            ValueError: if the captions are not one for each picture.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"one caption per picture wanted, got {len(pictures)} pictures, {len(captions)} captions")
        inputs = self.processor(
            text=list(captions),
            images=list(pictures),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        embeds = self.model(**inputs.to(self.model.device))
        cosines = (embeds.image_embeds * embeds.text_embeds).sum(dim=-1)
        return 100 * cosines.clamp(min=0).cpu().numpy()

    def mean(self, pictures: Iterable[np.ndarray], captions: Sequence[str], batch_size: int = 25) -> float:
        """The mean score of pictures (H, W, 3) uint8; no more than a batch of them is held.

        Raises:
            ValueError: if the captions are not one for each picture, or there are none.
        """
        if not captions:
            raise ValueError("there are no pictures and captions to score")
        pairs = batched(zip(pictures, captions, strict=True), batch_size)
        scores = [self(*zip(*batch, strict=True)) for batch in pairs]
        return float(np.concatenate(scores).mean())
