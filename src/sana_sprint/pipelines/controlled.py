"""Drawings that ControlNets are shown, checked, encoded and at each step turned into residuals: for every pipeline.

B pictures, C channels, H W latent grid.
"""

import logging
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as DiffusersAutoencoderDC
from diffusers.models.controlnets.controlnet_sana import SanaControlNetModel as DiffusersSanaControlNetModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as DiffusersSanaTransformer2DModel
from PIL import Image
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.conditioning.table import control_named
from sana_sprint.pipelines.base import SprintPipeline
from sana_sprint.pipelines.call import Call, Conditioning, Plan
from sana_sprint.pipelines.drawings import Drawing, DrawingCache, ShownDrawing, read_drawings
from sana_sprint.pipelines.images import Canvas
from sana_sprint.pipelines.pictures import on_canvas, read_pictures
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.multi_control import SanaMultiControlNetModel, guidance_for
from sana_sprint.transformer.residuals import ControlSamples, EarlyResiduals, scale_residuals, sum_residuals

logger = logging.getLogger(__name__)

# Entries of both configs that must be the same, for residuals to be those of the transformer's tokens.
SHARED = ("in_channels", "patch_size", "caption_channels", "num_attention_heads", "attention_head_dim")


def check_fits(controlnet: Any, transformer: Any) -> None:
    """Refuses a single ControlNet that was not made for such a transformer."""
    control, config = controlnet.config, transformer.config
    for name in SHARED:
        if control[name] != config[name]:
            raise ValueError(f"controlnet must have the transformer's {name}={config[name]}, got {control[name]}")
    if control.num_layers >= config.num_layers:
        raise ValueError(
            f"controlnet must have fewer than the transformer's {config.num_layers} blocks, got {control.num_layers}"
        )
    if control.get("guidance_embeds") and not config.get("guidance_embeds"):
        raise ValueError("controlnet has guidance_embeds, and the transformer has none")
    if control.get("residual_placement") == "before" and isinstance(transformer, DiffusersSanaTransformer2DModel):
        raise ValueError(
            "a controlnet with residual_placement='before' needs the transformer of sana_sprint, got diffusers'"
        )


def _as_one(controlnet: Any) -> Any:
    """A list of ControlNets as one network; anything else as it is."""
    several = isinstance(controlnet, (list, tuple))
    return SanaMultiControlNetModel.from_controlnets(controlnet) if several else controlnet


class ControlledPipeline(SprintPipeline):
    """The stages of a pipeline whose calls have `drawings`; ahead of what its calls start from.

    Args:
        tokenizer, text_encoder, vae, transformer, scheduler: as for every pipeline.
        controlnet: One, ours or diffusers', or a list of several, which becomes a `SanaMultiControlNetModel`.

    Attributes:
        drawing_cache: The latents of the last drawings. None to encode them in every call.
    """

    model_cpu_offload_seq = "text_encoder->controlnet->transformer->vae"

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | DiffusersAutoencoderDC,
        transformer: SanaTransformer2DModel | DiffusersSanaTransformer2DModel,
        controlnet: SanaControlNetModel
        | DiffusersSanaControlNetModel
        | SanaMultiControlNetModel
        | Sequence[SanaControlNetModel | DiffusersSanaControlNetModel],
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=_as_one(controlnet))
        self.drawing_cache: DrawingCache | None = DrawingCache()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As for every pipeline; a `controlnet` that is passed may be a list, as in the constructor.

        Args:
            pretrained_model_name_or_path: The folder, or the repository as "owner/name". One without a ControlNet needs
                `controlnet`.
            **kwargs: As for SanaSprintPipeline.
        """
        if "controlnet" in kwargs:
            kwargs["controlnet"] = _as_one(kwargs["controlnet"])
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def control_preview(
        self,
        image: Any,
        control: str | None = None,
        height: int | None = None,
        width: int | None = None,
        use_resolution_binning: bool = True,
    ) -> list[Image.Image]:
        """What a ControlNet is shown of pictures, in the size that is drawn.

        Args:
            image: One or several pictures, as a control image of `__call__`; not latents.
            control: A name in `sana_sprint.conditioning.table.CONTROLS`, such as "edges": what is found in the
                pictures. None shows them as they are.
            height, width, use_resolution_binning: As in the call.

        Raises:
            ValueError: for what the call refuses, or an unknown control.
            ImportError: if a control needs a package that is not installed.
        """
        find = None if control is None else control_named(control)
        canvas = self._choose_canvas(height, width, use_resolution_binning)
        pixels = torch.stack([on_canvas(picture, canvas) for picture in read_pictures(image, opaque=True)])
        shown = self.image_processor.postprocess(pixels, "pil", do_denormalize=[False] * len(pixels))
        # In the size drawn, as in training: lines found in a larger picture would get thin and grey here.
        return shown if find is None else [find(picture) for picture in shown]

    def read_drawings(self, control_image: Any, scale: Any, start: Any, end: Any) -> list[Drawing]:
        """The arguments of a call that drawings are made of; ValueError as in `drawings.read_drawings`."""
        count = len(self.controlnet.nets) if isinstance(self.controlnet, SanaMultiControlNetModel) else None
        return read_drawings(control_image, scale, start, end, self.transformer.config.in_channels, count)

    def check_inputs(self, call: Call) -> Plan:
        """diffusers' name for the checks of a call, here those of its drawings too; ValueError if it cannot work."""
        plan = super().check_inputs(call)
        network = self.controlnet
        for one in network.nets if isinstance(network, SanaMultiControlNetModel) else [network]:
            check_fits(one, self.transformer)
        for drawing in call.drawings:
            plan.rows("control_image", drawing.count)
            self._check_given("control_image", drawing, plan.canvas)
        return plan

    def shown_drawings(self, call: Call, plan: Plan, device: torch.device) -> Sequence[ShownDrawing]:
        """The drawings that count at some step, encoded unless they were so in one of the last calls."""
        shown = []
        for drawing in call.drawings:
            latents, steps = None, self.num_timesteps
            if drawing.scale and not drawing.counts(steps):
                logger.warning(
                    "a drawing has no effect: none of %d steps lies whole within control_guidance_start %g and"
                    " control_guidance_end %g",
                    steps,
                    drawing.start,
                    drawing.end,
                )
            if drawing.counts(steps):
                rows = plan.rows("control_image", drawing.count)
                latents = self._drawing_latents(drawing, plan.canvas).to(self.device_of("controlnet"))[rows]
            shown.append(ShownDrawing(drawing=drawing, latents=latents))
        return shown

    def _drawing_latents(self, drawing: Drawing, canvas: Canvas) -> torch.Tensor:
        if self.drawing_cache is None or drawing.latents is not None:
            return self._latents_of(drawing, canvas)
        return self.drawing_cache.latents(
            self.vae, self.device_of("vae"), drawing, astuple(canvas), lambda: self._latents_of(drawing, canvas)
        )

    def flow_velocity(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        conditioning: Conditioning,
        controlnet_block_samples: ControlSamples | None = None,
    ) -> torch.Tensor:
        """The transformer's, with the residuals of all ControlNets that count at this step; without any, as it is."""
        scales = [shown.drawing.scale_at(self._step, self.num_timesteps) for shown in conditioning.drawings]
        if any(scales):
            samples = self._residuals(latents, time, conditioning, scales)
            given = [] if controlnet_block_samples is None else [controlnet_block_samples]
            controlnet_block_samples = sum_residuals([*given, samples])
        return super().flow_velocity(latents, time, conditioning, controlnet_block_samples)

    def _residuals(
        self, latents: torch.Tensor, time: torch.Tensor, conditioning: Conditioning, scales: Sequence[float]
    ) -> ControlSamples:
        """What the ControlNets add to the transformer's tokens, where and in what it computes."""
        network, device, dtype = self.controlnet, self.device_of("controlnet"), self.controlnet.dtype
        embeds, mask = conditioning.text
        guidance = None if conditioning.guidance is None else conditioning.guidance.to(device)
        inputs: dict[str, Any] = {
            "encoder_hidden_states": embeds.to(device, dtype),
            "encoder_attention_mask": None if mask is None else mask.to(device),
            "timestep": time.to(device),
            "attention_kwargs": self.attention_kwargs,
            "return_dict": False,
        }
        drawings = [None if shown.latents is None else shown.latents.to(dtype) for shown in conditioning.drawings]
        if isinstance(network, SanaMultiControlNetModel):
            inputs |= {"controlnet_cond": drawings, "conditioning_scale": scales, "guidance": guidance}
            samples = network(latents.to(device, dtype), **inputs)[0]
        else:
            inputs |= {"controlnet_cond": drawings[0]} | guidance_for(network, guidance)
            samples = scale_residuals(network(latents.to(device, dtype), **inputs)[0], scales[0])
        place = latents.device, self.transformer.dtype
        return samples.to(*place) if isinstance(samples, EarlyResiduals) else tuple(one.to(*place) for one in samples)
