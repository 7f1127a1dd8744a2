"""One call's arguments to pictures: text, denoising, decoding, the part that all SANA-Sprint pipelines share.

B pictures, C channels, H W latent grid, L text tokens, D width of the text encoder.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import PixArtImageProcessor
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as DiffusersAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as DiffusersSanaTransformer2DModel
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.pipelines.call import Call, Conditioning, Known, Plan
from sana_sprint.pipelines.checks import (
    check_choice,
    check_generator,
    check_latents,
    check_names,
    finite_number,
    whole_number,
)
from sana_sprint.pipelines.clock import Clock, clock_for
from sana_sprint.pipelines.coding import CodingPipeline
from sana_sprint.pipelines.drawings import ShownDrawing
from sana_sprint.pipelines.images import OUTPUT_TYPES, Canvas, choose_canvas, fit_to_canvas
from sana_sprint.pipelines.output import SanaPipelineOutput
from sana_sprint.pipelines.pictures import Given, on_canvas
from sana_sprint.plugin import PublishedPipeline
from sana_sprint.text.cache import TextCache
from sana_sprint.text.encoder import check_embeds, check_prompt, encode_prompts, repeat_for_images
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import ControlSamples

logger = logging.getLogger(__name__)


@contextmanager
def _scaled_lora(text_encoder: torch.nn.Module, scale: float | None) -> Iterator[None]:
    """Inside, the LoRA layers of a text encoder have this scale, or their own with None."""
    if scale is None or not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)


class SprintPipeline(PublishedPipeline, CodingPipeline):
    """The stages of every SANA-Sprint pipeline.

    A pipeline adds `__call__`, which puts its arguments into a `Call` and hands that to `draw`. Five hooks do what text
    to image does, until a pipeline has its own: `known_pictures`, `shown_drawings`, `first_latents`, `flow_velocity`
    and `finish`.

    Args:
        tokenizer: Gemma's.
        text_encoder: Gemma-2 without its language head. With None, calls need `prompt_embeds`.
        vae: Ours or diffusers'. With None, calls need `output_type="latent"`.
        transformer: Ours or diffusers'.
        scheduler: SCMScheduler, ours or diffusers', or a flow-matching scheduler of diffusers.

    Attributes:
        text_cache: What the text encoder has read before, instruction and prompts. None to read everything in each
            call, which gives the same embeddings up to float rounding.
        text_lengths: Ascending. The network is given text padded to the first of these that it fits into; empty to give
            it text without padding. `compile_pipeline` sets them.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "prompt_attention_mask"]

    # State of the current call, readable before the first one.
    _guidance_scale: float | None = None
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps = 0
    _step = 0
    _interrupt = False

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | DiffusersAutoencoderDC,
        transformer: SanaTransformer2DModel | DiffusersSanaTransformer2DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        # Public attributes in diffusers. Without an autoencoder, the factor of the published ones.
        self.vae_scale_factor = 32 if vae is None else 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        self.image_processor = PixArtImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.text_cache: TextCache | None = TextCache()
        self.text_lengths: tuple[int, ...] = ()

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale of the current or last call, None before the first."""
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """The attention arguments of the current or last call, None before the first."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """How often the current or last call calls the network, 0 before the first."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current call is to stop. A callback stops it by setting `_interrupt`."""
        return self._interrupt

    def known_pictures(self, call: Call, plan: Plan, device: torch.device) -> Known | None:
        """Hook: what a call starts from, encoded. It runs first, so that the autoencoder is not in memory later."""
        return None

    def shown_drawings(self, call: Call, plan: Plan, device: torch.device) -> Sequence[ShownDrawing]:
        """Hook: what ControlNets are shown, encoded, one drawing for each of them; right after `known_pictures`."""
        return ()

    def first_latents(self, call: Call, noise: torch.Tensor, known: Known | None, clock: Clock) -> torch.Tensor:
        """Hook: noise of unit variance to what the first step starts from (B, C, H, W), in the clock's scale."""
        return clock.from_noise(noise)

    def flow_velocity(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        conditioning: Conditioning,
        controlnet_block_samples: ControlSamples | None = None,
    ) -> torch.Tensor:
        """Hook: the flow-matching velocity for latents (B, C, H, W) of unit scale at time (B,) in [0, 1].

        Here it is the transformer's, with the residuals of a ControlNet added to its blocks if there are any.
        """
        dtype = self.transformer.dtype
        embeds, mask = conditioning.text
        return self.transformer(
            latents.to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            encoder_attention_mask=mask,
            timestep=time,
            guidance=conditioning.guidance,
            controlnet_block_samples=controlnet_block_samples,
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )[0]

    def finish(self, images: torch.Tensor, call: Call, plan: Plan, known: Known | None) -> torch.Tensor:
        """Hook: the last word on the result, which is latents for `output_type="latent"`, else pixels in [0, 1]."""
        return images

    def draw(self, call: Call) -> SanaPipelineOutput | tuple[Any]:
        """Everything that a call does, in order. What can be refused is refused before a network runs."""
        clock = clock_for(self.scheduler)
        plan = self.check_inputs(call)
        device = self._execution_device
        clock.set_steps(
            plan.num_inference_steps,
            call.timesteps,
            call.max_timesteps,
            call.intermediate_timesteps,
            device,
            strength=1.0 if call.source is None else call.source.strength,
        )
        self._guidance_scale = call.guidance_scale
        self._attention_kwargs = call.attention_kwargs
        self._num_timesteps = len(clock.timesteps)
        self._interrupt = False

        known = self.known_pictures(call, plan, device)
        drawings = self.shown_drawings(call, plan, device)
        embeds, mask = self.encode_prompt(
            call.prompt,
            num_images_per_prompt=plan.images_per_prompt,
            device=device,
            prompt_embeds=call.prompt_embeds,
            prompt_attention_mask=call.prompt_attention_mask,
            clean_caption=call.clean_caption,
            max_sequence_length=call.max_sequence_length,
            complex_human_instruction=call.complex_human_instruction,
            lora_scale=(call.attention_kwargs or {}).get("scale"),
        )
        conditioning = Conditioning(
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            guidance=self._scaled_guidance(plan.guidance_scale, embeds),
            known=known,
            drawings=drawings,
            text_lengths=self.text_lengths,
        )
        channels, canvas = self.transformer.config.in_channels, plan.canvas
        # Float32 whatever the networks compute in: same seed, same noise.
        noise = self.prepare_latents(
            plan.batch_size,
            channels,
            canvas.height,
            canvas.width,
            torch.float32,
            device,
            call.generator,
            call.latents,
        )
        latents = self._denoise(call, clock, self.first_latents(call, noise, known, clock), conditioning)
        if call.output_type == "latent":
            images = self.finish(latents, call, plan, known)
        else:
            pixels = self.image_processor.denormalize(fit_to_canvas(self._decode(latents), canvas))
            pixels = self.finish(pixels, call, plan, known)
            images = self.image_processor.postprocess(pixels, call.output_type, do_denormalize=[False] * len(pixels))
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=images) if call.return_dict else (images,)

    def check_inputs(self, call: Call) -> Plan:
        """What a call comes to.

        Raises:
            ValueError: for everything in it that cannot work, with the value found and the value wanted. The timetable
                is the scheduler's to check.
        """
        num_prompts = self._check_text(call)
        images_per_prompt = 1
        if call.num_images_per_prompt is not None:
            images_per_prompt = whole_number("num_images_per_prompt", call.num_images_per_prompt)
        steps = None
        if call.timesteps is None or call.num_inference_steps is not None:
            steps = whole_number("num_inference_steps", call.num_inference_steps)
        check_choice("output_type", call.output_type, OUTPUT_TYPES)
        check_names("callback_on_step_end_tensor_inputs", call.callback_tensors, self._callback_tensor_inputs)
        if self.vae is None and call.output_type != "latent":
            raise ValueError(f"a pipeline without vae can only give output_type='latent', got {call.output_type!r}")
        plan = Plan(
            canvas=self._choose_canvas(call.height, call.width, call.use_resolution_binning),
            num_inference_steps=steps,
            images_per_prompt=images_per_prompt,
            batch_size=num_prompts * images_per_prompt,
            guidance_scale=finite_number("guidance_scale", call.guidance_scale),
        )
        check_generator(call.generator, plan.batch_size)
        if call.latents is not None:
            check_latents("latents", call.latents, self._latents_shape(plan.batch_size, plan.canvas))
        return plan

    def _choose_canvas(self, height: Any, width: Any, use_resolution_binning: bool) -> Canvas:
        config, factor = self.transformer.config, self.vae_scale_factor
        return choose_canvas(
            height,
            width,
            native_size=config.sample_size * factor,
            multiple=config.patch_size * factor,
            use_bins=use_resolution_binning,
        )

    def _latents_shape(self, count: int, canvas: Canvas) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return (count, self.transformer.config.in_channels, canvas.height // factor, canvas.width // factor)

    def _check_given(self, name: str, given: Given, canvas: Canvas) -> None:
        """Refuses latents of another size than the canvas's, and pictures where nothing can encode them."""
        if given.latents is not None:
            wanted = self._latents_shape(given.count, canvas)
            check_latents(f"{name}, as it has the channels of latents,", given.latents, wanted)
        elif self.vae is None:
            raise ValueError(f"a pipeline without vae needs latents as {name}, got pictures")

    def _latents_of(self, given: Given, canvas: Canvas) -> torch.Tensor:
        """Scaled latents (pictures, C, H, W) in float32, encoded if they were not given."""
        if given.latents is not None:
            return given.latents.float()
        device = self.device_of("vae")
        return self._encode(torch.stack([on_canvas(picture, canvas).to(device) for picture in given.pictures]))

    def _check_text(self, call: Call) -> int:
        """The number of prompts of a call."""
        if (call.prompt is None) == (call.prompt_embeds is None):
            found = "neither" if call.prompt is None else "both"
            raise ValueError(f"one of prompt and prompt_embeds must be given, got {found}")
        if call.prompt_embeds is None and call.prompt_attention_mask is not None:
            raise ValueError("prompt_attention_mask belongs to prompt_embeds, got it with a prompt")
        whole_number("max_sequence_length", call.max_sequence_length)
        if call.prompt_embeds is None:
            return len(self._check_prompt(call.prompt))
        check_embeds(call.prompt_embeds, call.prompt_attention_mask)
        count, _, width = call.prompt_embeds.shape
        wanted = self.transformer.config.caption_channels
        if width != wanted:
            raise ValueError(
                f"prompt_embeds must have the transformer's caption_channels={wanted} as width, got {width}"
            )
        return count

    def _check_prompt(self, prompt: Any) -> list[str]:
        """A prompt as a list, for a pipeline that can read it."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("a pipeline without text_encoder or tokenizer needs prompt_embeds, got prompt")
        return check_prompt(prompt)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts to embeddings and mask, one for each picture, as `__call__` takes them. Without gradients.

        Args:
            prompt: One or several.
            num_images_per_prompt: How often each is repeated: all pictures of the first prompt, then of the second.
            device: Of the result; the transformer's by default. The text encoder computes on its own.
            prompt_embeds, prompt_attention_mask: (prompts, L, D) and (prompts, L), to be repeated only.
            clean_caption: Remove what captions from the web are full of, such as links; needs ftfy and beautifulsoup4.
            max_sequence_length: L. What a prompt has beyond it is cut off, and a warning says what that was.
            complex_human_instruction: Lines that the text encoder reads before the prompt.
            lora_scale: Scale of the LoRA layers of the text encoder, if it has any.

        Returns:
            Embeddings (B, L, D) in the text encoder's dtype, and mask (B, L), 1 where there is text and 0 where the
            embeddings mean nothing.

        Raises:
            ValueError: if prompts or embeddings are not what is described here, or for a prompt without text encoder.
        """
        device = self._execution_device if device is None else device
        if prompt_embeds is None:
            prompts = self._check_prompt(prompt)
            if lora_scale is not None:
                self._lora_scale = lora_scale  # diffusers contract: what `lora_scale` of the LoRA mixin returns
            with _scaled_lora(self.text_encoder, lora_scale):
                prompt_embeds, prompt_attention_mask, cut = encode_prompts(
                    self.tokenizer,
                    self.text_encoder,
                    prompts,
                    device=self.device_of("text_encoder"),
                    dtype=self.text_encoder.dtype,
                    max_sequence_length=max_sequence_length,
                    instruction=complex_human_instruction,
                    clean_caption=clean_caption,
                    cache=self.text_cache,
                )
            for lost in filter(None, cut):
                logger.warning(
                    "a prompt is longer than max_sequence_length=%d tokens; this end of it was cut off: %s",
                    max_sequence_length,
                    lost,
                )
        embeds, mask = repeat_for_images(
            prompt_embeds,
            prompt_attention_mask,  # type: ignore[arg-type]  # refuses None
            num_images_per_prompt,
        )
        return embeds.to(device), mask.to(device)

    def _scaled_guidance(self, guidance_scale: float, prompt_embeds: torch.Tensor) -> torch.Tensor | None:
        config = self.transformer.config
        if not config.guidance_embeds:
            return None
        # Rounded to the embeddings' dtype before it is scaled, as in diffusers: the network was trained on that.
        guidance = torch.full((len(prompt_embeds),), guidance_scale, dtype=torch.float32, device=prompt_embeds.device)
        return guidance.to(prompt_embeds.dtype) * config.guidance_embeds_scale

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of unit variance (B, C, H, W) for pictures of a height and width in pixels, or the given `latents`.

        Raises:
            ValueError: if there are not as many generators as pictures, or the latents have another shape.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // factor, width // factor)
        check_generator(generator, batch_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        check_latents("latents", latents, shape)
        return latents.to(device=device, dtype=dtype)

    def _denoise(self, call: Call, clock: Clock, latents: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The first latents to the autoencoder's, times its scaling factor."""

        def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.flow_velocity(latents, time, conditioning)  # of the present step: callbacks exchange it

        estimate = latents
        timesteps = clock.timesteps
        with self.progress_bar(total=len(timesteps)) as progress:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._step = index
                latents, estimate = clock.step(network, index, latents, call.generator)
                is_last = index == len(timesteps) - 1
                if is_last:
                    latents = estimate  # one tensor, so that a callback that edits it in place edits the result
                if call.callback_on_step_end is not None:
                    latents, conditioning = self._call_back(call, index, timestep, latents, conditioning)
                    if is_last:
                        estimate = latents
                progress.update()
        return clock.result(estimate)

    def _call_back(
        self, call: Call, index: int, timestep: torch.Tensor, latents: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, Conditioning]:
        """Show the caller what was asked for after a step; returns latents and conditioning to go on with."""
        tensors: dict[str, Any] = {
            "latents": latents,
            "prompt_embeds": conditioning.prompt_embeds,
            "prompt_attention_mask": conditioning.prompt_attention_mask,
        }
        shown = {name: tensors[name] for name in call.callback_tensors}
        returned = call.callback_on_step_end(self, index, timestep, shown) or {}  # type: ignore[misc]
        tensors.update({name: value for name, value in returned.items() if name in tensors})
        latents = tensors.pop("latents")
        # Made anew even for the same tensors, which the callback may have edited in place.
        if tensors.keys() & (shown.keys() | returned.keys()):
            conditioning = replace(conditioning, **tensors)
        return latents, conditioning
