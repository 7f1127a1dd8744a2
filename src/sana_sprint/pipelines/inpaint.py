"""A prompt, a picture and a mask to pictures that differ within the mask: SanaSprintInpaintPipeline.

B pictures, C channels, H W latent grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput as ImageInput
from diffusers.loaders import SanaLoraLoaderMixin

from sana_sprint.pipelines.call import Call, Conditioning, Known, Plan, StepCallback
from sana_sprint.pipelines.clock import DEFAULT_STEPS
from sana_sprint.pipelines.from_image import FromImagePipeline
from sana_sprint.pipelines.output import SanaPipelineOutput
from sana_sprint.pipelines.pictures import Source, resized, size_of
from sana_sprint.pipelines.text_to_image import DEFAULT_CALLBACK_TENSORS, DEFAULT_INSTRUCTION
from sana_sprint.transformer.residuals import ControlSamples
from sana_sprint.trigflow.scheduler import INTERMEDIATE_TIMESTEPS, MAX_TIMESTEPS


class SanaSprintInpaintPipeline(FromImagePipeline, SanaLoraLoaderMixin):
    """Inpainting with SANA-Sprint (arXiv 2503.09641): what a mask covers is drawn anew, all else is kept bit for bit.

    Needs no weights of its own. What is kept takes part in every step with the noise of that step, so that what is
    drawn fits in. diffusers has no such pipeline.

    Args:
        tokenizer: Gemma's.
        text_encoder: Gemma-2 without its language head; None for calls with `prompt_embeds`.
        vae: The autoencoder, ours or diffusers'; None for calls with latents as `image` and `output_type="latent"`.
        transformer: The network, ours or diffusers'.
        scheduler: As for SanaSprintPipeline.
    """

    def check_inputs(self, call: Call) -> Plan:
        """diffusers' name for the checks of a call, here those of its masks too; ValueError if it cannot work."""
        plan = super().check_inputs(call)
        source = self.source_of(call)
        if not source.masks:
            raise ValueError("mask_image must be given, got None")
        sizes = [size_of(picture) for picture in source.pictures]
        if source.latents is not None:
            sizes = [(plan.canvas.asked_height, plan.canvas.asked_width)] * source.count
        masks = plan.rows("mask_image", len(source.masks))
        for mask, image in zip(masks, plan.rows("image", source.count), strict=True):
            found, wanted = size_of(source.masks[mask]), sizes[image]
            if found != wanted:
                raise ValueError(
                    f"mask_image must have the size of its image, {wanted[0]}x{wanted[1]}, got {found[0]}x{found[1]}"
                )
        return plan

    def _size(self, source: Source, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """Height and width asked for, those of the images where None; ValueError if the images have several."""
        if height is not None and width is not None:
            return height, width
        sizes = {size_of(picture) for picture in source.pictures}
        if source.latents is not None:
            rows, columns = source.latents.shape[-2:]
            sizes = {(rows * self.vae_scale_factor, columns * self.vae_scale_factor)}
        if len(sizes) > 1:
            raise ValueError(f"height and width must be given for images of several sizes, got {sorted(sizes)}")
        own_height, own_width = sizes.pop()
        return own_height if height is None else height, own_width if width is None else width

    def flow_velocity(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        conditioning: Conditioning,
        controlnet_block_samples: ControlSamples | None = None,
    ) -> torch.Tensor:
        """The transformer's where it draws; where the picture is kept, the one that leads to it.

        Whatever the scheduler then does with its estimate of the clean latents, what is kept is in it, and with the
        same noise as the rest in the latents of the next step.
        """
        known = conditioning.known
        assert known is not None
        drawn = super().flow_velocity(latents, time, conditioning, controlnet_block_samples)
        kept = (latents - known.latents) / time.view(-1, 1, 1, 1)
        return torch.lerp(kept, drawn.to(latents.dtype), known.redrawn)

    def finish(self, images: torch.Tensor, call: Call, plan: Plan, known: Known | None) -> torch.Tensor:
        """Put back what is kept, as it was given: latents, or pixels in float32, which all output types come from."""
        assert known is not None
        source, canvas = self.source_of(call), plan.canvas
        if call.output_type == "latent":
            return torch.where(known.redrawn == 0, known.latents, images)
        if source.latents is not None:
            return images
        size = (canvas.asked_height, canvas.asked_width)
        kept = torch.stack([resized(picture, *size).to(images.device) for picture in source.pictures])
        masks = torch.stack([resized(mask, *size).to(images.device) for mask in source.masks])
        kept, masks = kept[plan.rows("image", len(kept))], masks[plan.rows("mask_image", len(masks))]
        return torch.lerp(kept, images.float(), masks)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = MAX_TIMESTEPS,
        intermediate_timesteps: float | None = INTERMEDIATE_TIMESTEPS,
        guidance_scale: float = 4.5,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float = 0.8,
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
    ) -> SanaPipelineOutput | tuple[Any]:
        """Draw parts of pictures anew.

        Args:
            prompt: What to draw; a list draws each. Not together with `prompt_embeds`.
            num_inference_steps: How often the network is called at strength 1, with a scheduler of first order.
                SCMScheduler is made for 1 to 4.
            timesteps: The steps themselves, instead of their number: for SCMScheduler angles in radians, descending
                from at most pi/2 to 0, one more than there are steps; otherwise what the scheduler takes.
            max_timesteps: For SCMScheduler, the first angle in radians.
            intermediate_timesteps: For SCMScheduler, the second of two steps' angles in radians. None spaces the angles
                of any number of steps evenly.
            guidance_scale: How closely the picture follows the prompt. It is an input of the network, and without
                effect on a transformer without `guidance_embeds`.
            image: The pictures to draw in: one, one for each prompt, or one for each picture to be drawn. PIL images,
                arrays (height, width, channels), tensors (channels, height, width), batches or lists of them; floats in
                [0, 1] or uint8 in 0 to 255; RGB, grey, or with transparency, which shows white. A tensor
                (pictures, C, H, W) with the channels of latents is taken for what `encode_image` or
                `output_type="latent"` returned, and not encoded again; it has no pixels to be kept.
            mask_image: What to redraw, as many as images or one for all, in the size of the image: 1 or white to be
                redrawn, 0 or black to be kept, between them a mixture. PIL images, arrays (height, width), tensors
                (height, width), batches or lists of them; floats in [0, 1] or uint8 in 0 to 255.
            strength: In [0, 1], how much of what is redrawn is new: the share of the timetable that is run, as in
                SanaSprintImg2ImgPipeline. 1 starts from noise alone, in which the first step sees nothing of what is
                kept either: in few steps, less fits better.
            num_images_per_prompt: Pictures for each prompt. None is 1.
            height, width: Size of the pictures in pixels; that of the image by default. In another size, the image is
                resized, and then kept.
            eta: Ignored: it is a setting of DDIM, which cannot serve here. Part of diffusers' signature.
            generator: Source of all noise. With a list of one for each picture, a picture is the same in every batch.
            latents: The noise at the start, instead of drawing it: unit variance, (B, C, H, W).
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

        Returns:
            The pictures as `images`, first all of the first prompt; or a tuple of them.

        Raises:
            ValueError: for an argument or a scheduler that cannot work, before a network runs.
            torch.OutOfMemoryError: if a picture cannot be decoded even in tiles, which is tried when need be.
        """
        source = self.read_source(image, strength, mask_image)
        height, width = self._size(source, height, width)
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
                source=source,
            )
        )
