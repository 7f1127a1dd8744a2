"""Noisy latents, time and caption to the velocity of the flow: SanaTransformer2DModel.

B batch, C channels, N = H*W tokens, D width, L text tokens.
"""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from sana_sprint.layers.norms import SanaModulatedNorm
from sana_sprint.transformer.residuals import ControlSamples, residuals_by_block
from sana_sprint.transformer.trunk import SanaTrunk


class SanaTransformer2DModel(SanaTrunk):
    """The linear-attention diffusion transformer of SANA and SANA-Sprint (arXiv 2410.10629, 2503.09641).

    Config, state-dict keys and shapes are those of diffusers' class of the same name, so folders are exchangeable.

    Args:
        in_channels, out_channels: channels of the latents; `out_channels` None means `in_channels`.
        num_attention_heads, attention_head_dim: linear self attention; their product is the width D.
        num_layers: number of blocks.
        num_cross_attention_heads, cross_attention_head_dim, cross_attention_dim: softmax attention to the caption.
        caption_channels: width of the text encoder's features.
        mlp_ratio: expansion of the mix-FFN.
        dropout: after both attentions; 0 in every published checkpoint.
        attention_bias: bias of the self attention's projections.
        sample_size: height and width of the latents the checkpoint was trained on, in latent cells.
        patch_size: latent cells per token and axis.
        norm_elementwise_affine, norm_eps: of the norms inside the blocks.
        interpolation_scale: None for no positions (512 and 1024 px), a number for sincos positions (2K and 4K).
        guidance_embeds: embed the guidance scale beside the time (SANA-Sprint).
        guidance_embeds_scale: factor a pipeline applies to the guidance scale before it calls `forward`.
        qk_norm: None or "rms_norm_across_heads".
        timestep_scale: ignored here; kept because it is part of published configs, for pipelines to read.

    Raises:
        ValueError: for a config without cross attention, or an unknown `qk_norm`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SanaTransformerBlock", "PatchEmbed", "SanaModulatedNorm"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]
    _repeated_blocks = ["SanaTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 20,
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
    ) -> None:
        super().__init__()
        width = self.build_trunk().width
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.norm_out = SanaModulatedNorm(width)
        self.proj_out = nn.Linear(width, patch_size * patch_size * (out_channels or in_channels))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: ControlSamples | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor, ...]:
        """Predict the flow's velocity (noise minus data).

        Args:
            hidden_states: noisy latents (B, C, H, W).
            encoder_hidden_states: text features (B, L, caption_channels), one caption per latent.
            timestep: flow time (B,) or (); in [0, 1] for Sprint, 0 clean and 1 noise.
            guidance: guidance scale times `guidance_embeds_scale` (B,); only, and always, with `guidance_embeds`.
            encoder_attention_mask: (B, L), 1 where a text token counts; None when all do. A bias (B, 1, L) on the
                attention scores is taken as it is.
            attention_mask: ignored; self attention is over all tokens. Part of diffusers' signature.
            attention_kwargs: {"scale": LoRA scale}.
            controlnet_block_samples: residuals (B, N, D) of ControlNets; number k of a sequence is added to the output
                of block k + 1, of `EarlyResiduals` to that of block k.
            return_dict: return a `Transformer2DModelOutput` and not a tuple.

        Returns:
            The velocity, of the shape of `hidden_states` (with `out_channels`).

        Raises:
            ValueError: for a text batch that differs from the image batch, sizes that are no multiple of the patch
                size, or a guidance that the config does not provide for.
        """
        inputs = self.embed_inputs(hidden_states, encoder_hidden_states, timestep, guidance, encoder_attention_mask)
        residuals = residuals_by_block(controlnet_block_samples or ())
        tokens = inputs.tokens
        for index, block in enumerate(self.transformer_blocks):
            tokens = self.run_block(block, tokens, inputs)
            if index in residuals:
                tokens = tokens + residuals[index]
        tokens = self.proj_out(self.norm_out(tokens, inputs.time_embedding, self.scale_shift_table))
        sample = self._unpatchify(tokens, inputs.height, inputs.width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatchify(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        patch = self.config.patch_size
        grid = tokens.unflatten(1, (height, width)).unflatten(3, (patch, patch, -1))  # B H W p p C
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height * patch, width * patch)
