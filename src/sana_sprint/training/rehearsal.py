"""A recipe to the footprint of each of its stages, from configs alone: no weights are read, and none are made."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.shapes.questions import NUM_ANSWERS
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION, instruction_prefix
from sana_sprint.training.autoencoder import (
    AutoencoderObjective,
    DecoderObjective,
    EncoderObjective,
    with_new_encoder,
)
from sana_sprint.training.control import ControlObjective
from sana_sprint.training.control_distillation import ControlDistillation
from sana_sprint.training.control_pixels import PixelObjective
from sana_sprint.training.control_sprint import SprintControlRecipe, sprint_control_objective
from sana_sprint.training.control_teacher import ControlRecipe, control_objective
from sana_sprint.training.data import PicturePool
from sana_sprint.training.distillation import Distillation, DistillationSettings, student_of
from sana_sprint.training.draws import Draws
from sana_sprint.training.expansion import expanded
from sana_sprint.training.fine_tuning import LoraRecipe, lora_objective
from sana_sprint.training.flow import FlowObjective, GuidanceObjective, use_training_kernels
from sana_sprint.training.footprint import EmptyLatents, Footprint, footprint
from sana_sprint.training.language import CaptionBatch, ReadingModel
from sana_sprint.training.loop import Objective
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.training.recipes import shapes
from sana_sprint.training.recipes.shapes import ShapesRecipe
from sana_sprint.training.recipes.shapes_control import ShapesControlRecipe
from sana_sprint.training.sprint import SprintRecipe, sprint_objective
from sana_sprint.training.teacher import TeacherRecipe, make_teacher
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

# Of a caption in a cache, at most: what pipelines read.
_TEXT_TOKENS = 300


def rehearse(recipe: Any, config: dict[str, Any]) -> dict[str, Footprint]:
    """The footprint of every stage of a recipe, by the stage's name.

    Args:
        recipe: one of `training.recipes`.
        config: of the transformer that any other recipe than that of shapes starts from.
    """
    with torch.device("meta"):
        if isinstance(recipe, ShapesRecipe):
            return _shapes(recipe)
        transformer = _transformer(config)
        if isinstance(recipe, ShapesControlRecipe | ControlRecipe | SprintControlRecipe):
            return _control(recipe, transformer)
        data = _latents(transformer, _TEXT_TOKENS)
        if isinstance(recipe, TeacherRecipe):
            teacher = make_teacher(recipe, transformer)
            use_training_kernels(teacher)
            return {"flow": footprint(FlowObjective(teacher, data, recipe.flow), recipe.loop)}
        if isinstance(recipe, LoraRecipe):
            objective = lora_objective(recipe, transformer, data, None if recipe.prior is None else data)
            return {"adapters": footprint(objective, recipe.loop)}
        assert isinstance(recipe, SprintRecipe)
        uncompiled = replace(recipe, distillation=_uncompiled(recipe.distillation))
        return {"distillation": footprint(sprint_objective(uncompiled, transformer, data), recipe.loop)}


def _transformer(config: dict[str, Any]) -> SanaTransformer2DModel:
    transformer = SanaTransformer2DModel.from_config(config)
    use_training_kernels(transformer)
    return transformer


def _latents(transformer: SanaTransformer2DModel, num_tokens: int) -> EmptyLatents:
    config = transformer.config
    latent_shape = (config.in_channels, config.sample_size, config.sample_size)
    return EmptyLatents(latent_shape, (num_tokens, config.caption_channels))


def _uncompiled(settings: DistillationSettings) -> DistillationSettings:
    return replace(settings, compile=False)


def _control(
    recipe: ShapesControlRecipe | ControlRecipe | SprintControlRecipe, transformer: SanaTransformer2DModel
) -> dict[str, Footprint]:
    """Of a recipe for ControlNets."""
    num_tokens = recipe.max_caption_tokens if isinstance(recipe, ShapesControlRecipe) else _TEXT_TOKENS
    data = replace(_latents(transformer, num_tokens), has_control=True)
    control = SanaControlNetModel.from_transformer(transformer, recipe.num_layers)
    use_training_kernels(control)
    if isinstance(recipe, ControlRecipe):
        return {"control": footprint(control_objective(recipe, transformer, data), recipe.loop)}
    student = student_of(transformer)
    if isinstance(recipe, SprintControlRecipe):
        uncompiled = replace(recipe, distillation=_uncompiled(recipe.distillation))
        objective = sprint_control_objective(uncompiled, transformer, control, student, data)
        return {"control distillation": footprint(objective, recipe.loop)}
    first = ControlObjective(transformer, control, data, recipe.control)
    stages = {"control": footprint(first, recipe.control_loop)}
    second = ControlDistillation(transformer, control, student, data, _uncompiled(recipe.distillation))
    vae = AutoencoderDC(**shapes.RECIPE.autoencoder.config)
    third = PixelObjective(student, control, vae, data, replace(recipe.pixels, compile=False))
    return {
        **stages,
        "control distillation": footprint(second, recipe.distillation_loop),
        "pixels": footprint(third, recipe.pixels_loop),
    }


class _EmptyPictures(PicturePool):
    """A pool of pictures of a size, without content, on the meta device."""

    def __init__(self, size: int) -> None:
        super().__init__(np.empty((0, size, size, 3), np.uint8), [])

    def batch(self, draws: Draws) -> torch.Tensor:
        return torch.empty(draws.size, 3, *self.pictures.shape[1:3], device=draws.device)


@dataclass
class _Captions:
    """Numbers of tokens: of the instruction, and of the longest caption behind it."""

    instruction: int
    caption: int


class _Reading(Objective[ReadingModel]):
    """The language stage on captions without content."""

    def __init__(self, model: ReadingModel, lengths: _Captions, settings: OptimiserSettings) -> None:
        super().__init__()
        self.model = model
        self.lengths = lengths
        self.settings = settings

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        ids = torch.ones(draws.size, self.lengths.caption, dtype=torch.long, device=draws.device)
        instruction = torch.ones(1, self.lengths.instruction, dtype=torch.long, device=draws.device)
        answers = torch.zeros(draws.size, len(NUM_ANSWERS), dtype=torch.long, device=draws.device)
        return self.model.losses(CaptionBatch(instruction, ids, ids, answers))

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("language_model", trainable(self.model), self.settings)]

    def averaged(self) -> ReadingModel:
        return self.model


def _reading_model(recipe: ShapesRecipe) -> ReadingModel:
    settings = recipe.language
    config = Gemma2Config(vocab_size=settings.vocabulary_size, **settings.config)
    language = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    return ReadingModel(language, settings.recalled_tokens)


def _shapes(recipe: ShapesRecipe) -> dict[str, Footprint]:
    vae_settings, flow = recipe.autoencoder, recipe.flow
    pool = _EmptyPictures(recipe.picture_size)
    # A word is a token to this tokenizer, or nearly.
    lengths = _Captions(len(instruction_prefix(COMPLEX_HUMAN_INSTRUCTION).split()), recipe.max_caption_tokens)

    def vae() -> AutoencoderDC:
        return AutoencoderDC(**vae_settings.config)

    encoder = EncoderObjective(with_new_encoder(vae(), vae_settings), vae(), pool, vae_settings)
    transformer = _transformer(flow.config)
    data = _latents(transformer, recipe.max_caption_tokens)
    guidance = GuidanceObjective(copy.deepcopy(transformer), transformer, data, flow)
    reading = _Reading(_reading_model(recipe), lengths, recipe.language.optimiser)

    def student(settings: DistillationSettings, num_layers: int | None = None) -> Distillation:
        teacher = _transformer(flow.config)
        deeper = None if num_layers is None else expanded(teacher, num_layers)
        return Distillation(teacher, data, _uncompiled(settings), deeper)

    return {
        "autoencoder": footprint(AutoencoderObjective(vae(), pool, vae_settings), vae_settings.loop),
        "decoder": footprint(DecoderObjective(vae(), pool, vae_settings), vae_settings.decoder_loop),
        "encoder": footprint(encoder, vae_settings.encoder_loop),
        "language": footprint(reading, recipe.language.loop),
        "flow": footprint(FlowObjective(_transformer(flow.config), data, flow), flow.loop),
        "guidance": footprint(guidance, flow.guidance_loop),
        "consistency": footprint(student(recipe.consistency), recipe.consistency_loop),
        "distillation": footprint(student(recipe.distillation), recipe.distillation_loop),
        "adversarial": footprint(student(recipe.adversarial), recipe.adversarial_loop),
        "one_step": footprint(student(recipe.one_step), recipe.one_step_loop),
        "matching": footprint(student(recipe.matching), recipe.matching_loop),
        "expansion": footprint(student(recipe.expansion, recipe.student_layers), recipe.expansion_loop),
        "several_steps": footprint(student(recipe.several_steps, recipe.student_layers), recipe.several_steps_loop),
    }
