"""Tokens to attended tokens: ReLU linear attention, softmax cross attention, and the module both are projected by.

B batch, N tokens, L text tokens, H heads, d head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from sana_sprint.layers.norms import RMSNorm

# Keeps a token whose kernel is zero everywhere from dividing by zero (SANA's value).
LINEAR_ATTENTION_EPS = 1e-15


def _by_head(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, H, d) to (B, H, N, d) in float32, and in this order in memory, as batched matrix products want it."""
    return tokens.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def linear_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention with the kernel relu(q) relu(k), in O(N) (Katharopoulos et al., 2020; SANA, section 2.2).

    All of shape (B, N, H, d); the result is too, in the dtype of `value`. The products are associated whichever way
    is cheaper: through the (d, d) state when there are more tokens than features, else through the (N, N) scores.
    """
    dtype = value.dtype
    # The sums over tokens overflow float16 and lose their small terms in bfloat16.
    query, key, value = _by_head(F.relu(query)), _by_head(F.relu(key)), _by_head(value)
    if query.shape[2] > query.shape[3]:
        numerator = query @ (key.transpose(2, 3) @ value)
        denominator = query @ key.sum(dim=2).unsqueeze(3)  # B H N 1
    else:
        scores = query @ key.transpose(2, 3)
        numerator = scores @ value
        denominator = scores.sum(dim=3, keepdim=True)
    return (numerator / (denominator + LINEAR_ATTENTION_EPS)).transpose(1, 2).to(dtype)


def _is_plain(projection: nn.Module) -> bool:
    """Whether it computes the product with its weight and nothing else, and the weight can be read."""
    if type(projection) is not nn.Linear:  # but one with an adapter, or of a quantising library
        return False
    weight = projection.weight
    return type(weight.data) is torch.Tensor and weight.itemsize > 1 and not weight.is_meta


class SanaLinearAttnProcessor:
    """Self attention of a SANA block: `linear_attention` over all tokens."""

    def __call__(
        self,
        attn: "SanaAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, encoder_hidden_states)
        attended = attn.to_out[1](attn.to_out[0](linear_attention(query, key, value).flatten(2)))
        if attended.dtype == torch.float16:
            # The float16 checkpoints of SANA were trained with, and depend on, this saturation.
            attended = attended.clamp(-65504, 65504)
        return attended


class SanaCrossAttnProcessor:
    """Cross attention of a SANA block: softmax attention through diffusers' dispatcher of attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "SanaAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, encoder_hidden_states)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else attention_mask[:, None],  # B 1 L -> B 1 1 L
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](attended.flatten(2).to(query.dtype)))


class SanaAttention(nn.Module, AttentionModuleMixin):
    """Projections to query, key and value, optional norms over the full width, a processor, and the way out.

    `context_dim` is the width of the tokens attended to; None means self attention.
    """

    processor: Callable[..., torch.Tensor]
    to_qkv: nn.Linear  # these two exist while projections are fused
    to_kv: nn.Linear

    _default_processor_cls = SanaLinearAttnProcessor
    _available_processors = [SanaLinearAttnProcessor, SanaCrossAttnProcessor]

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f'qk_norm must be None or "rms_norm_across_heads", got {qk_norm!r}')
        inner_dim = heads * head_dim
        self.heads = heads
        self.use_bias = bias
        self.is_cross_attention = context_dim is not None
        # Read by diffusers' own processors, which may be set on this module.
        self.rescale_output_factor = 1.0
        self.to_q = nn.Linear(dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner_dim, bias=bias)
        self.norm_q = RMSNorm(inner_dim) if qk_norm else None
        self.norm_k = RMSNorm(inner_dim) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim, bias=out_bias), nn.Dropout(dropout)])
        self.processor = SanaCrossAttnProcessor() if self.is_cross_attention else SanaLinearAttnProcessor()

    @property
    def fusable(self) -> dict[str, nn.Module]:
        """The projections of the same tokens, by name: across, those to key and value."""
        names = ("to_k", "to_v") if self.is_cross_attention else ("to_q", "to_k", "to_v")
        return {name: getattr(self, name) for name in names}

    def check_can_be_fused(self) -> None:
        """Refuse projections that one product with a copy of their weights would not equal.

        Raises:
            ValueError: if they are quantised, offloaded layer by layer, or have adapters (LoRA).
        """
        for name, projection in self.fusable.items():
            if not _is_plain(projection):
                raise ValueError(
                    f"only plain weights of 16 bits or more can be fused, and {name} is a {type(projection).__name__}"
                    f" with weights of {projection.weight.dtype} on {projection.weight.device}: load it without"
                    " quantisation or offloading, or fuse its adapters into the weights and unload them"
                )

    def fuse_projections(self) -> None:
        """Compute `fusable` as one product with a copy of their weights; the result is the same.

        As in diffusers, the copy is in the state dict beside the separate weights, and does not follow them: call
        `unfuse_projections` before they change.

        Raises:
            ValueError: as `check_can_be_fused`.
        """
        self.check_can_be_fused()
        super().fuse_projections()

    def project(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (B, N, H, d) of the tokens, key and value of `context` (None: of the tokens), norms applied."""
        context = hidden_states if context is None else context
        if self.fused_projections and any(type(projection) is not nn.Linear for projection in self.fusable.values()):
            raise ValueError("an adapter was added to fused projections and has no effect: unfuse_qkv_projections()")
        if not self.fused_projections:
            query, key, value = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        elif self.is_cross_attention:
            query = self.to_q(hidden_states)
            key, value = self.to_kv(context).chunk(2, dim=-1)
        else:
            query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        shape = (self.heads, -1)
        return query.unflatten(-1, shape), key.unflatten(-1, shape), value.unflatten(-1, shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class FusingMixin(AttentionMixin):
    """A network with `SanaAttention`, all of whose projections are fused or none."""

    def fuse_qkv_projections(self) -> None:
        """`SanaAttention.fuse_projections` everywhere: fewer and larger products, for a copy of their weights.

        Raises:
            ValueError: before anything is fused, if one of them cannot be.
        """
        for module in self.modules():
            if isinstance(module, SanaAttention):
                module.check_can_be_fused()
        super().fuse_qkv_projections()
