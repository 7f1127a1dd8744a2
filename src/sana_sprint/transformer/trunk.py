"""What every SANA network shares: embed latents, time and caption, and run blocks over the tokens.

B batch, C channels, N = H*W tokens, D width, L text tokens.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from torch import nn

from sana_sprint.layers.attention import FusingMixin
from sana_sprint.layers.casting import QuietCastMixin
from sana_sprint.layers.embeddings import CaptionProjection, PatchEmbed, TimeEmbedding, TimeGuidanceEmbedding
from sana_sprint.layers.norms import RMSNorm
from sana_sprint.plugin import QuantisedModel, SingleFileModel
from sana_sprint.transformer.block import BlockShape, SanaTransformerBlock


class TrunkInputs(NamedTuple):
    """Everything a block needs, embedded."""

    tokens: torch.Tensor  # B N D
    caption: torch.Tensor  # B L D
    caption_bias: torch.Tensor | None  # B 1 L, added to the attention scores
    modulation: torch.Tensor  # B 6D, of all blocks
    time_embedding: torch.Tensor  # B D, of the last norm
    height: int  # in tokens
    width: int


def attention_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A 0/1 mask (B, L) as a bias (B, 1, L) on scores: 0 keeps, -10000 discards; a bias passes through unchanged.

    A finite bias and not minus infinity: a caption that is masked altogether must not become NaN.
    """
    if mask is None or mask.ndim == 3:
        return mask
    if mask.ndim != 2:
        raise ValueError(f"encoder_attention_mask must be (batch, tokens) or (batch, 1, tokens), got {(*mask.shape,)}")
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def block_shape(config: Mapping[str, Any]) -> BlockShape:
    """What the blocks of a network with this config are like.

    Raises:
        ValueError: for a config without cross attention.
    """
    entries = {field.name: config[field.name] for field in fields(BlockShape)}
    cross = {name: value for name, value in entries.items() if "cross_" in name}
    if None in cross.values():
        raise ValueError(
            "a SANA network reads its caption by cross attention: "
            f"{', '.join(cross)} must be numbers, got {', '.join(map(str, cross.values()))}"
        )
    return BlockShape(**entries)


class SanaTrunk(
    QuantisedModel,
    QuietCastMixin,
    FusingMixin,
    ConfigMixin,
    PeftAdapterMixin,
    SingleFileModel,
    FromOriginalModelMixin,
):
    """Embeddings and blocks; subclasses add what comes out. Inheritance adds no prefix to the state-dict keys."""

    def build_trunk(self) -> BlockShape:
        """Create the shared modules of the config, in the subclass's constructor; returns what the blocks are like.

        Raises:
            ValueError: for a config without cross attention, or an unknown `qk_norm`.
        """
        config = self.config
        shape = block_shape(config)
        time_embedding = TimeGuidanceEmbedding if config.guidance_embeds else TimeEmbedding
        self.patch_embed = PatchEmbed(
            config.sample_size, config.patch_size, config.in_channels, shape.width, config.interpolation_scale
        )
        self.time_embed = time_embedding(shape.width)
        self.caption_projection = CaptionProjection(config.caption_channels, shape.width)
        self.caption_norm = RMSNorm(shape.width)
        self.transformer_blocks = nn.ModuleList(SanaTransformerBlock(shape) for _ in range(config.num_layers))
        self.gradient_checkpointing = False
        return shape

    def embed_inputs(
        self,
        latents: torch.Tensor,
        caption: torch.Tensor,
        time: torch.Tensor,
        guidance: torch.Tensor | None,
        caption_mask: torch.Tensor | None,
    ) -> TrunkInputs:
        """Latents (B, C, H, W), caption (B, L, channels) and time (B,) to the inputs of the first block."""
        batch, _, height, width = latents.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"latent height and width must be multiples of the patch size {patch}, got {height}x{width}"
            )
        if caption.shape[0] != batch:
            raise ValueError(
                f"encoder_hidden_states must hold one caption per latent: got {caption.shape[0]} captions for {batch}"
                " latents"
            )
        tokens = self.patch_embed(latents)
        modulation, time_embedding = self.time_embed(time.expand(batch), guidance, tokens.dtype)
        return TrunkInputs(
            tokens=tokens,
            caption=self.caption_norm(self.caption_projection(caption)),
            caption_bias=attention_bias(caption_mask, tokens.dtype),
            modulation=modulation,
            time_embedding=time_embedding,
            height=height // patch,
            width=width // patch,
        )

    def run_block(self, block: nn.Module, tokens: torch.Tensor, inputs: TrunkInputs) -> torch.Tensor:
        """One block over `tokens`; recomputed in the backward pass when gradient checkpointing is on."""
        arguments = (
            tokens, inputs.caption, inputs.caption_bias, inputs.modulation, inputs.height, inputs.width
        )  # fmt: skip
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)
