"""The arguments of one call of a pipeline, what they come to once they are checked, and what the network is told.

B pictures, C channels, H W latent grid, L text tokens, D width of the text encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from sana_sprint.pipelines.drawings import Drawing, ShownDrawing
from sana_sprint.pipelines.images import Canvas
from sana_sprint.pipelines.pictures import Source
from sana_sprint.text.encoder import drop_padding

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments as the caller gave them; the pipeline's `__call__` documents them."""

    prompt: str | Sequence[str] | None
    num_inference_steps: int
    timesteps: Sequence[float] | None
    max_timesteps: float | None
    intermediate_timesteps: float | None
    guidance_scale: float
    num_images_per_prompt: int | None
    height: int | None
    width: int | None
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    output_type: str | None
    return_dict: bool
    clean_caption: bool
    use_resolution_binning: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: Sequence[str] | None
    max_sequence_length: int
    complex_human_instruction: Sequence[str] | None
    source: Source | None = None  # for pipelines that start from a picture, and only for those
    drawings: Sequence[Drawing] = ()  # one for each ControlNet

    @property
    def callback_tensors(self) -> tuple[str, ...]:
        """The names of the tensors that the callback wants; diffusers' callback objects know theirs themselves."""
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            return tuple(self.callback_on_step_end.tensor_inputs)
        return tuple(self.callback_on_step_end_tensor_inputs or ())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call comes to."""

    canvas: Canvas
    num_inference_steps: int | None  # None where only the timesteps say
    images_per_prompt: int
    batch_size: int  # B
    guidance_scale: float

    def rows(self, name: str, count: int) -> list[int]:
        """For each of the B pictures, which one of `count` things that were given under a name belongs to it.

        Raises:
            ValueError: unless one was given for all, one for each prompt, or one for each picture.
        """
        prompts = self.batch_size // self.images_per_prompt
        if count == prompts:
            return [picture // self.images_per_prompt for picture in range(self.batch_size)]
        if count not in (1, self.batch_size):
            raise ValueError(
                f"{name} must be one, or one for each of the {prompts} prompts, or one for each of the"
                f" {self.batch_size} pictures to draw, got {count}"
            )
        return [0] * self.batch_size if count == 1 else list(range(self.batch_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """The pictures that a call starts from, as the autoencoder encoded them."""

    latents: torch.Tensor  # B C H W, of unit variance, in float32
    redrawn: torch.Tensor  # B 1 H W, or for all cells 1 1 1 1: in [0, 1], how much of a cell is not kept


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """What the network is told besides latents and time. A callback may exchange the text between two steps."""

    prompt_embeds: torch.Tensor  # B L D
    prompt_attention_mask: torch.Tensor  # B L
    guidance: torch.Tensor | None  # B, already scaled; None for a network that takes none
    known: Known | None = None
    drawings: Sequence[ShownDrawing] = ()  # one for each ControlNet
    text_lengths: tuple[int, ...] = ()  # that the text is padded to, once its own padding is dropped

    @cached_property
    def text(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings and mask without padding, which most of L is; see `drop_padding`."""
        return drop_padding(self.prompt_embeds, self.prompt_attention_mask, self.text_lengths)
