"""Pictures and captions to what a network is trained on, computed as a pipeline computes it, in float16.

B pictures, H W pixels, C channels, h w latent grid, K tokens of one text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.text.cache import TextCache
from sana_sprint.text.encoder import encode_prompts
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.training.data import to_tensor


@dataclass(frozen=True, kw_only=True)
class ExampleEncoder:
    """The encoding half of a pipeline.

    Attributes:
        vae, tokenizer, text_encoder: The pipeline's.
        device, dtype: Where and in what the networks compute.
        captions_tokens: The number of tokens that a caption is cut to, instruction included as in a pipeline's
            max_sequence_length.
    """

    vae: AutoencoderDC
    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    captions_tokens: int = 300
    # What pipelines read with, too. It keeps the instruction, which is ten times as long as a caption.
    _cache: TextCache = field(default_factory=lambda: TextCache(max_prompts=0), init=False, repr=False)

    @torch.no_grad()
    def latents(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Latents (B, C, h, w) times the scaling factor, of pictures (H, W, 3) uint8 of one size."""
        pixels = to_tensor(np.stack(pictures)).to(self.device, self.dtype)
        latents = self.vae.encode(pixels, return_dict=False)[0]
        return (latents.float() * self.vae.config.scaling_factor).half().cpu().numpy()

    @torch.no_grad()
    def texts(
        self, captions: Sequence[str], instruction: Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION
    ) -> tuple[list[np.ndarray], int]:
        """Features (K, width) of each caption, without padding, and how many captions were too long and were cut."""
        embeds, mask, cut = encode_prompts(
            self.tokenizer,
            self.text_encoder,
            captions,
            device=self.device,
            dtype=self.dtype,
            max_sequence_length=self.captions_tokens,
            instruction=instruction,
            cache=self._cache,
        )
        # Tokens are padded on the right.
        features = [row[:length].half().cpu().numpy() for row, length in zip(embeds, mask.sum(1).tolist())]
        return features, sum(end is not None for end in cut)

    def empty_text(self) -> np.ndarray:
        """Features (K, width) of the empty caption, which stands without the instruction, as in SANA's training."""
        (features,), _ = self.texts([""], instruction=None)
        return features
