"""A shapes checkpoint and the flow transformer behind it to a ControlNet by edges: three stages, each resumable."""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import Gemma2Model, GemmaTokenizer

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.conditioning.edges import edges
from sana_sprint.shapes.captions import are_words_held_out, describe_colours
from sana_sprint.shapes.sampler import Example
from sana_sprint.training.autoencoder import encode_pictures
from sana_sprint.training.control import train_control
from sana_sprint.training.control_distillation import ControlDistillation
from sana_sprint.training.control_pixels import PixelObjective
from sana_sprint.training.data import picture_pool, pool_examples
from sana_sprint.training.export import export_network, record_of
from sana_sprint.training.flow import FlowData, encode_captions
from sana_sprint.training.identity import data_sources, made_once, sources
from sana_sprint.training.loop import train
from sana_sprint.training.origin import Origin
from sana_sprint.training.recipes.shapes_control import ShapesControlRecipe
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

_STAGES = ("control", "distillation", "pixels")
# Settings of a recipe that its latents and texts are made by.
_OF_THE_DATA = ("num_pictures", "picture_size", "pool_seed", "max_caption_tokens", "colour_caption_share")


def caption_by_colours(example: Example, rng: np.random.Generator) -> str:
    """A caption that names the colours of a training example only, in words that are not held out."""
    while True:
        caption = describe_colours(example.scene, rng)
        if not are_words_held_out(caption):
            return caption


class ShapesControlTraining:
    """The stages of a recipe in a folder; each leaves its result there, where the next one and a second run find it.

    Launched with `accelerate launch`, all processes train together, and the first one writes.

    Args:
        folder: for results and runs.
        recipe: all settings.
        teacher: where the flow transformer is.
        student: the folder of the pipeline that was distilled from it; its encoders make the data.
        device: where to train.
    """

    def __init__(
        self,
        folder: Path,
        recipe: ShapesControlRecipe,
        teacher: Origin,
        student: Path,
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.teacher = teacher
        self.student = student
        self.device = torch.device(device)
        self.processes = PartialState()

    def run(self) -> Path:
        """Run all stages; return the folder of the ControlNet, in bfloat16, with a record of how it was made."""
        self.control()
        self.distillation()
        self.pixels()
        folder = self.folder / "controlnet"
        if self.processes.is_main_process:
            logs = {stage: self._run(stage) / "log.jsonl" for stage in _STAGES}
            control = SanaControlNetModel.from_pretrained(self._result(_STAGES[-1]))
            export_network(folder, control, record_of(self.recipe, logs, self.device))
        self.processes.wait_for_everyone()
        return folder

    def control(self) -> None:
        """Train a ControlNet for the flow transformer."""
        recipe, teacher = self.recipe, self.teacher.load()
        control = SanaControlNetModel.from_transformer(teacher, recipe.num_layers)
        self._keep(
            "control",
            train_control(
                teacher, control, self.data(), recipe.control, recipe.control_loop, self._run("control"), self.device
            ),
        )

    def distillation(self) -> None:
        """Distil it, for the transformer that was distilled before."""
        recipe = self.recipe
        control = SanaControlNetModel.from_pretrained(self._result("control"))
        # A discriminator would be drawn at random.
        torch.manual_seed(recipe.distillation_loop.seed)
        data, teacher, student = self.data().to(self.device), self.teacher.load(), self._distilled()
        began_with = sources(data, teacher=teacher, control=control, student=student)
        objective = ControlDistillation(teacher, control, student, data, recipe.distillation)
        run, title = self._run("distillation"), "control distillation"
        average = train(objective, recipe.distillation_loop, run, title, self.device, sources=began_with)
        self._keep("distillation", average)

    def pixels(self) -> None:
        """Teach it by what the decoder shows of what it draws."""
        recipe = self.recipe
        control = SanaControlNetModel.from_pretrained(self._result("distillation"))
        # What a caption leaves open would be drawn as the mean of all that it may be.
        leaves_nothing_open = torch.tensor([is_complete for _, is_complete in self.captions()])
        data = self.data().only(leaves_nothing_open).to(self.device)
        student, vae = self._distilled(), self._vae()
        began_with = sources(data, control=control, student=student, autoencoder=vae)
        vae.to(memory_format=torch.channels_last)
        objective = PixelObjective(student, control, vae, data, recipe.pixels)
        run, title = self._run("pixels"), "pixels"
        average = train(objective, recipe.pixels_loop, run, title, self.device, sources=began_with)
        self._keep("pixels", average)

    def _distilled(self) -> SanaTransformer2DModel:
        return SanaTransformer2DModel.from_pretrained(self.student / "transformer", torch_dtype=torch.float32)

    def _vae(self) -> AutoencoderDC:
        return AutoencoderDC.from_pretrained(self.student / "vae", torch_dtype=torch.float32).eval()

    def data(self) -> FlowData:
        """Latents and texts of pictures, and latents of their edges; computed once, then read from the folder."""
        vae = self._vae()
        text_encoder = Gemma2Model.from_pretrained(self.student / "text_encoder", dtype=torch.float32)
        made_from = data_sources(self.recipe, _OF_THE_DATA, autoencoder=vae, text_encoder=text_encoder)
        with self.processes.main_process_first():
            kept = made_once(self.folder / "data.pt", made_from, lambda: self._encoded(vae, text_encoder))
        return FlowData(kept["latents"], kept["captions"], kept["masks"], controls=kept["controls"])

    def _encoded(self, vae: AutoencoderDC, text_encoder: Gemma2Model) -> dict[str, torch.Tensor]:
        recipe = self.recipe
        pool = picture_pool(self.folder / "pool", recipe.num_pictures, recipe.picture_size, recipe.pool_seed)
        drawings = np.stack([np.asarray(edges(picture)) for picture in pool.pictures])
        vae = vae.to(self.device, memory_format=torch.channels_last)
        latents, controls = (
            encode_pictures(vae, pictures) * vae.config.scaling_factor for pictures in (pool.pictures, drawings)
        )
        tokenizer = GemmaTokenizer.from_pretrained(self.student / "tokenizer")
        words = [caption for caption, _ in self.captions()]
        captions, masks = encode_captions(tokenizer, text_encoder, words, recipe.max_caption_tokens)
        return {"latents": latents, "captions": captions, "masks": masks, "controls": controls}

    def captions(self) -> list[tuple[str, bool]]:
        """One for each picture, its own or one that names its colours only; and whether it leaves no colour open."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.pool_seed, 1))
        return [
            (caption_by_colours(example, rng), True)
            if rng.random() < recipe.colour_caption_share
            else (example.caption, example.request.names_all_colours)
            for example in pool_examples(recipe.num_pictures, recipe.pool_seed)
        ]

    def _keep(self, stage: str, control: SanaControlNetModel) -> None:
        if self.processes.is_main_process:
            control.save_pretrained(self._result(stage))
        self.processes.wait_for_everyone()

    def _run(self, stage: str) -> Path:
        """Where the state and the log of a stage are."""
        return self.folder / stage / "run"

    def _result(self, stage: str) -> Path:
        return self.folder / stage / "controlnet"
