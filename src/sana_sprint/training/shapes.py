"""A recipe to the embedded checkpoint: every stage of training on the shapes world, in order, each resumable."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Gemma2Model, GemmaTokenizer

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.assembly import write_pipeline_index, write_scheduler
from sana_sprint.checkpoints.staging import staged
from sana_sprint.training.autoencoder import (
    distil_encoder,
    encode_pictures,
    peak_signal_to_noise,
    refine_decoder,
    train_autoencoder,
)
from sana_sprint.training.data import PicturePool, picture_pool
from sana_sprint.training.distillation import Distillation, DistillationSettings
from sana_sprint.training.expansion import expanded
from sana_sprint.training.export import RECORD, record_of, save_network, write_record
from sana_sprint.training.flow import FlowData, encode_captions, new_transformer, train_flow, train_guidance
from sana_sprint.training.identity import data_sources, made_once, sources
from sana_sprint.training.language import train_language_model
from sana_sprint.training.loop import train
from sana_sprint.training.recipes.shapes import ShapesRecipe
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.stages import STAGES
from sana_sprint.transformer.model import SanaTransformer2DModel

# Library and class of each component.
_CLASSES = {
    "scheduler": ("diffusers", "SCMScheduler"),
    "text_encoder": ("transformers", "Gemma2Model"),
    "tokenizer": ("transformers", "GemmaTokenizer"),
    "transformer": ("diffusers", "SanaTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderDC"),
}
# Settings of a recipe that its latents and texts are made by.
_OF_THE_DATA = ("num_pictures", "picture_size", "pool_seed", "max_caption_tokens")


class ShapesTraining:
    """The stages of a recipe in a folder; each leaves its result there, where the next one and a second run find it.

    `start` is a checkpoint that an earlier training assembled: its autoencoder and its language model are taken as
    they are, and the flow stage goes on from its transformer. Launched with `accelerate launch`, all processes train
    together, and the first one writes.
    """

    def __init__(
        self, folder: Path, recipe: ShapesRecipe, device: str | torch.device = "cpu", start: Path | None = None
    ) -> None:
        if start is not None and not (start / RECORD).is_file():
            raise ValueError(f"{start} is no checkpoint that this recipe has assembled: there is no {RECORD} in it")
        self.folder = folder
        self.recipe = recipe
        self.device = torch.device(device)
        self.start = start
        self.processes = PartialState()

    def run(self, stages: Sequence[str] = STAGES) -> Path:
        """Run the stages named, in order; return the folder of the assembled checkpoint.

        Raises:
            ValueError: for an unknown stage, or one whose predecessor has left no result.
        """
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"stages must be of {', '.join(STAGES)}, got {', '.join(unknown)}")
        for stage in STAGES:
            if stage in stages:
                getattr(self, stage)()
        return self.folder / "checkpoint"

    def pool(self) -> PicturePool:
        with self.processes.main_process_first():
            return self._pool()

    def autoencoder(self) -> None:
        if self.start:
            return
        vae = train_autoencoder(self.pool(), self.recipe.autoencoder, self._run("autoencoder"), self.device)
        self._keep("autoencoder", vae=vae)

    def decoder(self) -> None:
        if self.start:
            return
        vae = AutoencoderDC.from_pretrained(self._result("autoencoder", "vae"))
        vae = refine_decoder(vae, self.pool(), self.recipe.autoencoder, self._run("decoder"), self.device)
        self._keep("decoder", vae=vae)

    def encoder(self) -> None:
        if self.start:
            return
        vae = AutoencoderDC.from_pretrained(self._result("decoder", "vae"))
        vae = distil_encoder(vae, self.pool(), self.recipe.autoencoder, self._run("encoder"), self.device)
        self._keep("encoder", vae=vae)

    def language(self) -> None:
        if self.start:
            return
        captions = self.pool().captions
        tokenizer, model = train_language_model(captions, self.recipe.language, self._run("language"), self.device)
        self._keep("language", tokenizer=tokenizer, text_encoder=model)

    def flow(self) -> None:
        recipe = self.recipe.flow
        transformer = (
            SanaTransformer2DModel.from_pretrained(self.start / "transformer", torch_dtype=torch.float32)
            if self.start
            else new_transformer(recipe)
        )
        transformer = train_flow(transformer, self.flow_data(), recipe, recipe.loop, self._run("flow"), self.device)
        self._keep("flow", transformer=transformer)

    def guidance(self) -> None:
        teacher = SanaTransformer2DModel.from_pretrained(self._result("flow", "transformer"))
        data = self.flow_data()
        transformer = train_guidance(teacher, data, self.recipe.flow, self._run("guidance"), self.device)
        self._keep("guidance", transformer=transformer)

    def consistency(self) -> None:
        self._distil("consistency", "guidance", self.recipe.consistency, self.recipe.consistency_loop)

    def distillation(self) -> None:
        self._distil("distillation", "consistency", self.recipe.distillation, self.recipe.distillation_loop)

    def adversarial(self) -> None:
        self._distil("adversarial", "distillation", self.recipe.adversarial, self.recipe.adversarial_loop)

    def one_step(self) -> None:
        self._distil("one_step", "adversarial", self.recipe.one_step, self.recipe.one_step_loop)

    def matching(self) -> None:
        self._distil("matching", "one_step", self.recipe.matching, self.recipe.matching_loop)

    def expansion(self) -> None:
        recipe = self.recipe
        self._distil("expansion", "matching", recipe.expansion, recipe.expansion_loop, recipe.student_layers)

    def several_steps(self) -> None:
        self._distil("several_steps", "expansion", self.recipe.several_steps, self.recipe.several_steps_loop)

    def _distil(
        self, stage: str, before: str, settings: DistillationSettings, loop: LoopSettings, num_layers: int | None = None
    ) -> None:
        """Train the student that the stage before has left, and its network for the fakes' score or a new one.

        The student is deepened to `num_layers` first, if it has fewer.
        """
        teacher, student = (
            SanaTransformer2DModel.from_pretrained(self._result(name, "transformer")) for name in ("guidance", before)
        )
        if num_layers is not None:
            student = expanded(student, num_layers)
        left = self.folder / before / "fake_score"
        fake_score = SanaTransformer2DModel.from_pretrained(left) if left.is_dir() else None
        # The discriminator is drawn at random.
        torch.manual_seed(loop.seed)
        data = self.flow_data().to(self.device)
        began_with = sources(data, teacher=teacher, student=student)
        objective = Distillation(teacher, data, settings, student, fake_score)
        average = train(objective, loop, self._run(stage), stage, self.device, sources=began_with)
        if objective.fake_score is not None:
            self._keep(stage, fake_score=objective.fake_score)
        elif self.processes.is_main_process:
            shutil.rmtree(self.folder / stage / "fake_score", ignore_errors=True)  # of an earlier run
        self._keep(stage, transformer=average)

    def assemble(self) -> None:
        """Write the checkpoint in diffusers layout, in bfloat16, with a record of how it was made."""
        if self.processes.is_main_process:
            self._assemble()
        self.processes.wait_for_everyone()

    def _pool(self) -> PicturePool:
        recipe = self.recipe
        return picture_pool(self.folder / "pool", recipe.num_pictures, recipe.picture_size, recipe.pool_seed)

    def _assemble(self) -> None:
        student = SanaTransformer2DModel.from_pretrained(self._result("several_steps", "transformer"))
        with torch.no_grad():
            student.patch_embed.proj.weight.mul_(self.recipe.input_scale)
        tokenizer, text_encoder = self._language(torch.bfloat16)
        with staged(self.folder / "checkpoint", force=True) as folder:
            save_network(student.to(torch.bfloat16), folder / "transformer")
            save_network(self._vae("encoder", torch.bfloat16), folder / "vae")
            text_encoder.save_pretrained(folder / "text_encoder")
            tokenizer.save_pretrained(folder / "tokenizer")
            write_scheduler(folder / "scheduler", "scm", flow_shift=None)
            write_pipeline_index(folder, "scm", _CLASSES)
            write_record(folder, self._record())

    def _record(self) -> dict[str, Any]:
        """The settings, versions and losses that made the checkpoint."""
        logs = {
            stage: self._run(stage) / "log.jsonl" for stage in STAGES[STAGES.index("flow") if self.start else 0 : -1]
        }
        start = json.loads((self.start / RECORD).read_text(encoding="utf-8")) if self.start else None
        vae, pictures = self._vae("encoder", torch.float32), self._pool().pictures[:512]
        return {
            "command": "sana-sprint train shapes" + (" --start-from CHECKPOINT" if self.start else ""),
            "started_from": start,
            "reconstruction_decibels": round(peak_signal_to_noise(vae, pictures), 2),
            **record_of(self.recipe, logs, self.device),
        }

    def _vae(self, stage: str, dtype: torch.dtype) -> AutoencoderDC:
        folder = self.start / "vae" if self.start else self._result(stage, "vae")
        return AutoencoderDC.from_pretrained(folder, torch_dtype=dtype).eval()

    def _language(self, dtype: torch.dtype) -> tuple[GemmaTokenizer, Gemma2Model]:
        tokenizer = self.start / "tokenizer" if self.start else self._result("language", "tokenizer")
        text_encoder = self.start / "text_encoder" if self.start else self._result("language", "text_encoder")
        return GemmaTokenizer.from_pretrained(tokenizer), Gemma2Model.from_pretrained(text_encoder, dtype=dtype)

    def flow_data(self) -> FlowData:
        """Latents and text features of the pool; computed once, then read from the folder."""
        recipe, vae = self.recipe, self._vae("autoencoder", torch.float32)
        tokenizer, text_encoder = self._language(torch.float32)
        made_from = data_sources(recipe, _OF_THE_DATA, autoencoder=vae, text_encoder=text_encoder)
        path = self.folder / "flow" / "data.pt"
        with self.processes.main_process_first():
            kept = made_once(path, made_from, lambda: self._encoded(vae, tokenizer, text_encoder))
        return FlowData(kept["latents"], kept["captions"], kept["masks"])

    def _encoded(
        self, vae: AutoencoderDC, tokenizer: GemmaTokenizer, text_encoder: Gemma2Model
    ) -> dict[str, torch.Tensor]:
        pool = self._pool()
        vae = vae.to(self.device, memory_format=torch.channels_last)
        latents = encode_pictures(vae, pool.pictures) * vae.config.scaling_factor
        captions, masks = encode_captions(tokenizer, text_encoder, pool.captions, self.recipe.max_caption_tokens)
        return {"latents": latents, "captions": captions, "masks": masks}

    def _keep(self, stage: str, **results: Any) -> None:
        """Write the results of a stage, by name."""
        if self.processes.is_main_process:
            for name, result in results.items():
                result.save_pretrained(self.folder / stage / name)
        self.processes.wait_for_everyone()

    def _run(self, stage: str) -> Path:
        """Where the state and the log of a stage are."""
        return self.folder / stage / "run"

    def _result(self, stage: str, name: str) -> Path:
        path = self.folder / stage / name
        if not path.is_dir():
            raise ValueError(f"stage {stage!r} has left no result in {path}: run it first")
        return path
