"""Several ControlNets as one network: drawings to the sum of what each adds to a transformer's tokens."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet_sana import SanaControlNetModel as DiffusersSanaControlNetModel
from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from sana_sprint.plugin import QuantisedModel
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.residuals import ControlSamples, scale_residuals, sum_residuals


def guidance_for(controlnet: Any, guidance: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """The keyword for a ControlNet that takes guidance; none for diffusers', or one trained without."""
    return {"guidance": guidance} if controlnet.config.get("guidance_embeds") else {}


class SanaMultiControlNetModel(QuantisedModel, ModelMixin, ConfigMixin):
    """ControlNets side by side. Saves and loads as one model: one folder, one config, one file of weights.

    Args:
        controlnets: the configs of the ControlNets.

    Raises:
        ValueError: if there are none.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = SanaControlNetModel._no_split_modules
    _skip_layerwise_casting_patterns = SanaControlNetModel._skip_layerwise_casting_patterns
    _repeated_blocks = SanaControlNetModel._repeated_blocks

    @register_to_config
    def __init__(self, controlnets: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if not controlnets:
            raise ValueError("several ControlNets must be one at least, got an empty list")
        self.nets = nn.ModuleList(SanaControlNetModel(**config) for config in controlnets)

    @classmethod
    def from_controlnets(cls, nets: Sequence[Any]) -> "SanaMultiControlNetModel":
        """These ControlNets, ours or diffusers', side by side; they are not copied.

        Raises:
            ValueError: for what is no ControlNet of SANA, or one that is quantised by itself.
        """
        for net in nets:
            if not isinstance(net, (SanaControlNetModel, DiffusersSanaControlNetModel)):
                raise ValueError(f"every ControlNet must be a SanaControlNetModel, got {type(net).__name__}")
            if getattr(net, "is_quantized", False):
                raise ValueError(
                    "ControlNets are quantised together: save them as a SanaMultiControlNetModel, and load that with"
                    " quantization_config"
                )
        names = signature(SanaControlNetModel).parameters
        with torch.device("meta"):
            several = cls([{name: net.config[name] for name in names if name in net.config} for net in nets])
        several.nets = nn.ModuleList(nets)
        return several

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        controlnet_cond: Sequence[torch.Tensor | None],
        conditioning_scale: Sequence[float],
        encoder_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        guidance: torch.Tensor | None = None,
    ) -> SanaControlNetOutput | tuple[ControlSamples]:
        """The sum of the residuals of all ControlNets whose scale is not 0; the others are not run.

        Args:
            hidden_states, encoder_hidden_states, timestep, encoder_attention_mask, attention_kwargs, return_dict: as of
                each ControlNet.
            controlnet_cond, conditioning_scale: the latents of a drawing and a factor for each ControlNet.
            guidance: for those with `guidance_embeds`.

        Returns:
            For the transformer's `controlnet_block_samples`, as a `SanaControlNetModel` gives them.

        Raises:
            ValueError: as each ControlNet's `forward`.
        """
        samples = sum_residuals(
            scale_residuals(
                net(
                    hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    timestep=timestep,
                    controlnet_cond=drawing,
                    encoder_attention_mask=encoder_attention_mask,
                    attention_kwargs=attention_kwargs,
                    return_dict=False,
                    **guidance_for(net, guidance),
                )[0],
                scale,
            )
            for net, drawing, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True)
            if scale != 0
        )
        return SanaControlNetOutput(controlnet_block_samples=samples) if return_dict else (samples,)
