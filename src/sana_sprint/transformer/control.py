"""Noisy latents, a drawing's latents, time and caption to what a transformer adds to its tokens: SanaControlNetModel.

B batch, C channels, N = H*W tokens, D width, L text tokens.
"""

from inspect import signature
from typing import Any, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import nn

from sana_sprint.transformer.block import SanaTransformerBlock
from sana_sprint.transformer.residuals import ControlSamples, EarlyResiduals, Placement, scale_residuals
from sana_sprint.transformer.trunk import SanaTrunk


def zero_linear(width: int) -> nn.Linear:
    """A projection of tokens (B, N, D) that gives zeros until it has learnt."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def scale_of_tokens(scale: float | torch.Tensor, tokens: torch.Tensor) -> float | torch.Tensor:
    """A scale, one for all pictures or one for each, as a factor of tokens (B, N, D).

    Raises:
        ValueError: for a tensor of another number of scales.
    """
    if not isinstance(scale, torch.Tensor):
        return scale
    if scale.numel() not in (1, len(tokens)):
        raise ValueError(
            f"conditioning_scale must be one number or one for each of {len(tokens)} pictures, got {(*scale.shape,)}"
        )
    return scale.to(tokens).reshape(-1, 1, 1)


class SanaControlNetModel(SanaTrunk):
    """A copy of a transformer's first blocks that reads a drawing too (PixArt-δ, arXiv 2401.05252; SANA's ControlNet).

    The drawing enters before the first block, and every block has a way out: a residual for the transformer's tokens.
    Ways in and out are zero at first, so that nothing is changed by a ControlNet that has learnt nothing.

    Config, state-dict keys and shapes are those of diffusers' class of the same name, so folders are exchangeable. The
    entries from `guidance_embeds` on are ours, for the blocks of SANA-Sprint.

    Args:
        in_channels: channels of the latents, the drawing's too.
        out_channels: ignored; part of published configs.
        num_layers: number of blocks, and of residuals.
        num_attention_heads, attention_head_dim, num_cross_attention_heads, cross_attention_head_dim,
            cross_attention_dim, caption_channels, mlp_ratio, dropout, attention_bias, sample_size, patch_size,
            norm_elementwise_affine, norm_eps, interpolation_scale, guidance_embeds, guidance_embeds_scale, qk_norm,
            timestep_scale: those of the transformer, see `SanaTransformer2DModel`.
        residual_placement: "after", as in diffusers: residual number k is added to the output of the transformer's
            block k + 1, and the drawing to the embedded latents. "before", as NVlabs trains: number k is added to the
            input of block k + 1, and the drawing to the output of block 0, of which the ControlNet then has a copy,
            `base_block`.

    Raises:
        ValueError: for a config without cross attention, or an unknown `qk_norm` or `residual_placement`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SanaTransformerBlock", "PatchEmbed"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]
    _repeated_blocks = ["SanaTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 7,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 32,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = None,
        timestep_scale: float = 1.0,
        residual_placement: Placement = "after",
    ) -> None:
        super().__init__()
        if residual_placement not in get_args(Placement):
            raise ValueError(
                f"residual_placement must be {' or '.join(get_args(Placement))}, got {residual_placement!r}"
            )
        shape = self.build_trunk()
        self.base_block = SanaTransformerBlock(shape) if residual_placement == "before" else None
        self.input_block = zero_linear(shape.width)
        self.controlnet_blocks = nn.ModuleList(zero_linear(shape.width) for _ in range(num_layers))

    @classmethod
    def from_transformer(
        cls, transformer: ModelMixin, num_layers: int = 7, residual_placement: Placement = "after"
    ) -> "SanaControlNetModel":
        """An untrained ControlNet for a transformer, ours or diffusers': on its device, in its dtype.

        Embeddings and blocks are copies of the transformer's, ways in and out are zero.

        Args:
            transformer: a SanaTransformer2DModel, not quantised and without adapters.
            num_layers: how many of its first blocks are copied. Fewer than it has: every residual acts on a later
                block.
            residual_placement: as in the config.

        Raises:
            ValueError: for a transformer that cannot be copied, or a `num_layers` that does not fit it.
        """
        depth = transformer.config.num_layers
        if not 0 < num_layers < depth:
            raise ValueError(
                f"num_layers must be from 1 to {depth - 1} for a transformer of {depth} blocks, got {num_layers}"
            )
        entries = {name: transformer.config[name] for name in signature(cls).parameters if name in transformer.config}
        control = cls(**{**entries, "num_layers": num_layers, "residual_placement": residual_placement})
        control.to(device=transformer.device, dtype=transformer.dtype)

        weights = transformer.state_dict()
        ways = ("input_block.", "controlnet_blocks.")
        copied = {
            name: name.replace("base_block.", "transformer_blocks.0.")
            for name in control.state_dict()
            if not name.startswith(ways)
        }
        if getattr(transformer, "is_quantized", False) or not weights.keys() >= set(copied.values()):
            raise ValueError("a transformer is copied before it is quantised, adapted or fused, not after")
        control.load_state_dict({name: weights[source] for name, source in copied.items()}, strict=False)
        return control

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float | torch.Tensor = 1.0,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        guidance: torch.Tensor | None = None,
    ) -> SanaControlNetOutput | tuple[ControlSamples]:
        """What to add to a transformer's tokens for the same latents, caption and time.

        Args:
            hidden_states, encoder_hidden_states, timestep, encoder_attention_mask, guidance: as the transformer's.
            controlnet_cond: latents of the drawing, as a picture's: scaled, of the shape of `hidden_states`; or one
                (1, C, H, W) for all pictures.
            conditioning_scale: factor of the residuals, a number or one per picture (B,).
            attention_mask: ignored, as the transformer does.
            attention_kwargs: {"scale": LoRA scale}.
            return_dict: return a `SanaControlNetOutput` and not a tuple.

        Returns:
            For the transformer's `controlnet_block_samples`: a tuple of residuals (B, N, D), one per block; in
            `EarlyResiduals` with `residual_placement` "before".

        Raises:
            ValueError: as the transformer's `forward`; for a drawing of another shape, or of scales of another number.
        """
        batch, *rest = hidden_states.shape
        if controlnet_cond.ndim != 4 or len(controlnet_cond) not in (1, batch) or [*controlnet_cond.shape[1:]] != rest:
            raise ValueError(
                f"controlnet_cond must be latents of the shape {(*hidden_states.shape,)} of hidden_states, got"
                f" {(*controlnet_cond.shape,)}"
            )
        inputs = self.embed_inputs(hidden_states, encoder_hidden_states, timestep, guidance, encoder_attention_mask)
        tokens = inputs.tokens
        scale = scale_of_tokens(conditioning_scale, tokens)
        if self.base_block is not None:
            tokens = self.run_block(self.base_block, tokens, inputs)
        tokens = tokens + self.input_block(self.patch_embed(controlnet_cond.to(tokens.dtype)))
        residuals = []
        for block, way_out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            tokens = self.run_block(block, tokens, inputs)
            residuals.append(way_out(tokens))
        samples: ControlSamples = tuple(residuals) if self.base_block is None else EarlyResiduals(tuple(residuals))
        if isinstance(scale, torch.Tensor) or scale != 1:
            samples = scale_residuals(samples, scale)
        return SanaControlNetOutput(controlnet_block_samples=samples) if return_dict else (samples,)
