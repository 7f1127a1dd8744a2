"""A prompt and a drawing to pictures in one to four steps: SanaSprintControlNetPipeline, which starts from noise.

B pictures, C channels, H W latent grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput as ImageInput
from diffusers.loaders import SanaLoraLoaderMixin

from sana_sprint.pipelines.call import Call, StepCallback
from sana_sprint.pipelines.clock import DEFAULT_STEPS
from sana_sprint.pipelines.controlled import ControlledPipeline
from sana_sprint.pipelines.output import SanaPipelineOutput
from sana_sprint.pipelines.text_to_image import DEFAULT_CALLBACK_TENSORS, DEFAULT_INSTRUCTION
from sana_sprint.trigflow.scheduler import INTERMEDIATE_TIMESTEPS, MAX_TIMESTEPS


class SanaSprintControlNetPipeline(ControlledPipeline, SanaLoraLoaderMixin):
    """Text to image with SANA-Sprint and a ControlNet (arXiv 2503.09641).

    Arguments are those of SanaSprintPipeline, and for the drawing those of diffusers' SanaControlNetPipeline. diffusers
    has no such pipeline.

    Args:
        tokenizer: Gemma's.
        text_encoder: Gemma-2 without its language head; None for calls with `prompt_embeds`.
        vae: The autoencoder, ours or diffusers'; None for calls with latents as `control_image` and
            `output_type="latent"`.
        transformer: The network, ours or diffusers'.
        controlnet: A SanaControlNetModel for that transformer, ours or diffusers', or a list of several.
        scheduler: As for SanaSprintPipeline.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = MAX_TIMESTEPS,
        intermediate_timesteps: float | None = INTERMEDIATE_TIMESTEPS,
        guidance_scale: float = 4.5,
        control_image: ImageInput | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = DEFAULT_CALLBACK_TENSORS,
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = DEFAULT_INSTRUCTION,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> SanaPipelineOutput | tuple[Any]:
        """Draw pictures after drawings.

        Args:
            prompt: What to draw; a list draws each. Not together with `prompt_embeds`.
            num_inference_steps: How often the network is called, with a scheduler of first order. SCMScheduler is made
                for 1 to 4.
            timesteps: The steps themselves, instead of their number: for SCMScheduler angles in radians, descending
                from at most pi/2 to 0, one more than there are steps; otherwise what the scheduler takes.
            max_timesteps: For SCMScheduler, the first angle in radians.
            intermediate_timesteps: For SCMScheduler, the second of two steps' angles in radians. None spaces the angles
                of any number of steps evenly.
            guidance_scale: How closely the picture follows the prompt. It is an input of the network, and without
                effect on a transformer without `guidance_embeds`.
            control_image: What the ControlNet is shown: one drawing, one for each prompt, or one for each picture to be
                drawn. PIL images, arrays (height, width, channels), tensors (channels, height, width), batches or lists
                of them; floats in [0, 1] or uint8 in 0 to 255; RGB or grey, without transparency. They are resized to
                height and width. A tensor (drawings, C, H, W) with the channels of latents is taken for what an
                autoencoder made of them, times its scaling factor. Of several ControlNets, a list with one of all this
                for each. What was encoded in one of the last calls is not encoded again.
            controlnet_conditioning_scale: How much the drawing counts: a factor of what the ControlNet adds to the
                transformer. At 0 it is not run, and the picture is what it would be without. Of several ControlNets,
                one number for all or a list.
            num_images_per_prompt: Pictures for each prompt. None is 1.
            height, width: Size of the pictures in pixels; the size that the model was trained on by default.
            eta: Ignored: it is a setting of DDIM, which cannot serve here. Part of diffusers' signature.
            generator: Source of all noise. With a list of one for each picture, a picture is the same in every batch.
            latents: Noise to start from, instead of drawing it: unit variance, (B, C, H, W).
            prompt_embeds, prompt_attention_mask: What `encode_prompt` returned for one picture per prompt.
            output_type: "pil" for PIL images, "np" for an array (B, height, width, 3) or "pt" for a tensor
                (B, 3, height, width) with values in [0, 1], "latent" for the autoencoder's latents (B, C, H, W) times
                its scaling factor.
            return_dict: False for a tuple.
            clean_caption: Remove from prompts what captions from the web are full of, such as links; needs ftfy and
                beautifulsoup4.
            use_resolution_binning: Draw models of 512, 1024, 2048 and 4096 pixels in the size that is nearest in shape
                to the size asked for among those of their training, then resize and crop. A model of another size, and
                every model without this, draws the size asked for.
            attention_kwargs: {"scale": scale of the LoRA layers}.
            callback_on_step_end: Called after each step with the pipeline, the step's index, its timestep and a
                dictionary of tensors. What it returns in such a dictionary replaces the tensor, None changes nothing.
            callback_on_step_end_tensor_inputs: Which tensors: "latents", "prompt_embeds", "prompt_attention_mask".
            max_sequence_length: Text tokens kept. A longer prompt is cut, and a warning says what was cut off.
            complex_human_instruction: Lines that the text encoder reads before the prompt; None for none.
            control_guidance_start, control_guidance_end: In [0, 1], the shares of the steps between which the
                ControlNet counts: those steps that lie between them altogether. Numbers as for the scale.

        Returns:
            The pictures as `images`, first all of the first prompt; or a tuple of them.

        Raises:
            ValueError: for an argument or a scheduler that cannot work, before a network runs.
            torch.OutOfMemoryError: if a picture cannot be decoded even in tiles, which is tried when need be.
        """
        return self.draw(
            Call(
                prompt=prompt,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                max_timesteps=max_timesteps,
                intermediate_timesteps=intermediate_timesteps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                height=height,
                width=width,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                output_type=output_type,
                return_dict=return_dict,
                clean_caption=clean_caption,
                use_resolution_binning=use_resolution_binning,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=complex_human_instruction,
                drawings=self.read_drawings(
                    control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
                ),
            )
        )
