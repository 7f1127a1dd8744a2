"""Image tokens, caption tokens and a modulation to image tokens: one block of the SANA transformer.

B batch, N = H*W tokens, D width, L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sana_sprint.layers.attention import SanaAttention
from sana_sprint.layers.feed_forward import GLUMBConv
from sana_sprint.layers.norms import modulate


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What all blocks of one network have in common; names and meaning as in the config."""

    num_attention_heads: int
    attention_head_dim: int
    num_cross_attention_heads: int
    cross_attention_head_dim: int
    cross_attention_dim: int
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class SanaTransformerBlock(nn.Module):
    """Modulated linear attention, plain cross attention, modulated mix-FFN (SANA, section 2.2)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        width = shape.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=shape.norm_eps)
        self.attn1 = SanaAttention(
            width,
            shape.num_attention_heads,
            shape.attention_head_dim,
            bias=shape.attention_bias,
            dropout=shape.dropout,
            qk_norm=shape.qk_norm,
        )
        self.norm2 = nn.LayerNorm(width, elementwise_affine=shape.norm_elementwise_affine, eps=shape.norm_eps)
        self.attn2 = SanaAttention(
            width,
            shape.num_cross_attention_heads,
            shape.cross_attention_head_dim,
            context_dim=shape.cross_attention_dim,
            bias=True,
            dropout=shape.dropout,
            qk_norm=shape.qk_norm,
        )
        self.ff = GLUMBConv(width, width, shape.mlp_ratio, residual_connection=False)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        modulation: torch.Tensor,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """Tokens (B, N, D) with N = height * width, caption (B, L, D), its bias (B, 1, L), modulation (B, 6 D)."""
        tokens = hidden_states
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = (
            self.scale_shift_table[None] + modulation.unflatten(1, (6, -1))
        ).chunk(6, dim=1)  # B 1 D each

        attended = self.attn1(modulate(self.norm1(tokens), shift_attn, scale_attn).to(tokens.dtype))
        tokens = torch.addcmul(tokens, gate_attn, attended)

        # Cross attention is neither normalised, modulated nor gated, as in PixArt.
        tokens = tokens + self.attn2(tokens, encoder_hidden_states, encoder_attention_mask)

        grid = modulate(self.norm2(tokens), shift_ff, scale_ff).to(tokens.dtype).unflatten(1, (height, width))
        mixed = self.ff(grid.permute(0, 3, 1, 2))  # B D H W in channels-last memory: the tokens themselves
        return torch.addcmul(tokens, gate_ff, mixed.permute(0, 2, 3, 1).flatten(1, 2))
