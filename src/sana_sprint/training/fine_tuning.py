"""A SANA-Sprint checkpoint and a cache of a few pictures to a LoRA that teaches it what they show."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.datasets.source import LatentSource
from sana_sprint.training.export import record_of, write_record
from sana_sprint.training.flow import embeds_guidance
from sana_sprint.training.identity import sources
from sana_sprint.training.loop import Validation, train
from sana_sprint.training.lora import LoraObjective, LoraSettings, save_adapters
from sana_sprint.training.origin import Origin, open_cache
from sana_sprint.training.settings import LoopSettings, Precision
from sana_sprint.training.sprint import DTYPES, PROMPTS
from sana_sprint.transformer.model import SanaTransformer2DModel


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """All settings of a LoRA.

    Raises:
        ValueError: for settings that exclude each other.
    """

    model: str  # a SANA-Sprint checkpoint, a folder or hub id in diffusers' layout: a pipeline, or a transformer alone
    published: str  # the published model whose config a dry run takes where no model is at hand
    data: Path | None = None  # a cache of the pictures that `sana-sprint cache-latents` has written
    prior: Path | None = None  # one of other pictures, with captions that shall be drawn as before
    captions: CaptionChoice = field(default_factory=CaptionChoice)
    model_dtype: Precision = "bf16"  # of what is frozen; adapters are trained in float32
    # Keeps the inputs of blocks alone and runs blocks again: less memory, for a pass more.
    gradient_checkpointing: bool = True
    loop: LoopSettings
    lora: LoraSettings
    prompts: tuple[str, ...] = PROMPTS  # of the pictures that show how far it is

    def __post_init__(self) -> None:
        if self.model_dtype == "bf16" and self.loop.precision == "fp32":
            raise ValueError("model_dtype bf16 needs loop.precision bf16, which casts what goes into it; got fp32")
        if self.prior is not None and not self.lora.preservation_weight:
            raise ValueError("a prior has no effect with lora.preservation_weight 0: give it a weight, or leave it out")


def check_model(transformer: SanaTransformer2DModel) -> None:
    """Refuse what is no SANA-Sprint model.

    Raises:
        ValueError: for one that does not embed its guidance, or does not normalise queries and keys.
    """
    if not embeds_guidance(transformer) or transformer.config.qk_norm is None:
        raise ValueError(
            "the model is not one of SANA-Sprint: it must embed its guidance (guidance_embeds) and normalise queries"
            " and keys (qk_norm); a model of many steps is trained with the diffusion loss, which is not what this does"
        )


def lora_objective(
    recipe: LoraRecipe, transformer: SanaTransformer2DModel, data: LatentSource, prior: LatentSource | None
) -> LoraObjective:
    """What a recipe trains, on a transformer that is changed."""
    transformer.to(DTYPES[recipe.model_dtype])
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return LoraObjective(transformer, data, recipe.lora, prior)


def train_lora(
    recipe: LoraRecipe, origin: Origin, output: Path, device: torch.device, validate: Validation | None = None
) -> Path:
    """Train adapters; return their folder, which `load_lora_weights` of a pipeline takes.

    Args:
        recipe: all settings.
        origin: where the model is.
        output: for the run, which goes on from what is there, and the adapters.
        device: where to train.
        validate: as for `train`; it is shown the transformer with the average of its adapters.

    Raises:
        ValueError: if the model is not one of SANA-Sprint, or has no layers of that name, or the data are not for it.
        ImportError: if peft is not installed.
    """
    transformer = origin.load()
    check_model(transformer)
    data = open_cache(recipe.data, recipe.captions, transformer)
    prior = None if recipe.prior is None else open_cache(recipe.prior, recipe.captions, transformer)
    began_with = sources(data, model=transformer) | ({} if prior is None else {"prior": prior.identity()})
    # One half of every adapter is drawn at random.
    torch.manual_seed(recipe.loop.seed)
    objective = lora_objective(recipe, transformer, data.to(device), None if prior is None else prior.to(device))

    def show(average: nn.Module, step: int) -> float | None:
        assert validate is not None
        assert isinstance(average, nn.ParameterList)
        with objective.wearing(average) as adapted:
            return validate(adapted, step)

    run, folder = output / "run", output / "lora"
    average = train(objective, recipe.loop, run, "adapters", device, None if validate is None else show, began_with)
    if PartialState().is_main_process:
        save_adapters(objective.names, average, folder)
        write_record(folder, record_of(recipe, {"adapters": run / "log.jsonl"}, device))
    PartialState().wait_for_everyone()
    return folder
