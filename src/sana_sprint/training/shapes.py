"""A recipe to the embedded checkpoint: every stage of training on the shapes world, in order, each resumable."""

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import Gemma2Model, GemmaTokenizer

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.files import write_whole
from sana_sprint.training.autoencoder import (
    AutoencoderSettings,
    encode_pictures,
    peak_signal_to_noise,
    refine_decoder,
    train_autoencoder,
)
from sana_sprint.training.data import PicturePool, picture_pool
from sana_sprint.training.flow import (
    FlowData,
    FlowSettings,
    encode_captions,
    new_transformer,
    train_flow,
    train_guidance,
)
from sana_sprint.training.language import LanguageSettings, train_language_model
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel

STAGES = ("autoencoder", "decoder", "language", "flow", "guidance", "assemble")

# How a checkpoint was made, in its folder.
_RECORD = "training.json"
# Width of the text features, and so of the captions the transformer reads.
_TEXT_WIDTH = 128
_LATENT_CHANNELS = 16
_STAGE_WIDTHS = (32, 48, 96, 128)
_FLOW_SHIFT = 3.0


def _autoencoder_settings() -> AutoencoderSettings:
    config = {
        "latent_channels": _LATENT_CHANNELS,
        "encoder_block_out_channels": _STAGE_WIDTHS,
        "decoder_block_out_channels": _STAGE_WIDTHS,
        # No blocks at full resolution: stem and head resample instead, which is where most of the time would go.
        "encoder_layers_per_block": (0, 1, 1, 1),
        "decoder_layers_per_block": (0, 2, 2, 2),
        "encoder_qkv_multiscales": ((), (), (), ()),
        "decoder_qkv_multiscales": ((), (), (), ()),
        "decoder_conv_act_fn": "silu",
    }
    loop = LoopSettings(steps=5000, batch_size=32, ema_decay=0.998, seed=11)
    optimiser = OptimiserSettings(learning_rate=1e-3, warmup_steps=300, weight_decay=0.0)
    return AutoencoderSettings(
        config=config,
        loop=loop,
        optimiser=optimiser,
        decoder_loop=replace(loop, steps=4000, seed=15),
        decoder_optimiser=replace(optimiser, learning_rate=5e-4, warmup_steps=100),
    )


def _language_settings() -> LanguageSettings:
    config = {
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 1024,
        "sliding_window": 1024,
        # The attention kernels that transformers may choose treat the cap differently; without it they agree.
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    return LanguageSettings(
        vocabulary_size=1024,
        config=config,
        loop=LoopSettings(steps=2400, batch_size=64, ema_decay=0.99, seed=12),
        optimiser=OptimiserSettings(learning_rate=2e-3, warmup_steps=100),
    )


def _flow_settings() -> FlowSettings:
    config = {
        "in_channels": _LATENT_CHANNELS,
        "out_channels": _LATENT_CHANNELS,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "num_layers": 5,
        "num_cross_attention_heads": 6,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 192,
        "caption_channels": _TEXT_WIDTH,
        # 2.5 in the published models; with 2 the whole checkpoint stays below 12 MB.
        "mlp_ratio": 2.0,
        "sample_size": 8,
        "interpolation_scale": 1.0,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
    }
    return FlowSettings(
        config=config,
        loop=LoopSettings(steps=10_000, batch_size=64, seed=13),
        optimiser=OptimiserSettings(learning_rate=1e-3, warmup_steps=300),
        guidance_loop=LoopSettings(steps=900, batch_size=64, ema_decay=0.995, seed=14),
        guidance_optimiser=OptimiserSettings(learning_rate=3e-4, matrix_learning_rate=6e-4, warmup_steps=50),
    )


@dataclass(frozen=True, kw_only=True)
class ShapesRecipe:
    """All settings of the embedded checkpoint's last round. Hours on two CPU cores."""

    picture_size: int = 64
    num_pictures: int = 60_000
    pool_seed: int = 1
    max_caption_tokens: int = 32
    autoencoder: AutoencoderSettings = field(default_factory=_autoencoder_settings)
    language: LanguageSettings = field(default_factory=_language_settings)
    flow: FlowSettings = field(default_factory=_flow_settings)


def shortened(recipe: ShapesRecipe, steps: int, num_pictures: int, batch_size: int = 8) -> ShapesRecipe:
    """The same recipe with so few steps, on so few pictures, that it shows that everything runs, and nothing more."""

    def fewer(settings: LoopSettings) -> LoopSettings:
        return replace(settings, steps=steps, batch_size=batch_size)

    def at_once(settings: OptimiserSettings) -> OptimiserSettings:
        return replace(settings, warmup_steps=1)

    autoencoder, language, flow = recipe.autoencoder, recipe.language, recipe.flow
    return replace(
        recipe,
        num_pictures=num_pictures,
        autoencoder=replace(
            autoencoder,
            loop=fewer(autoencoder.loop),
            optimiser=at_once(autoencoder.optimiser),
            decoder_loop=fewer(autoencoder.decoder_loop),
            decoder_optimiser=at_once(autoencoder.decoder_optimiser),
            compile=False,
        ),
        language=replace(language, loop=fewer(language.loop), optimiser=at_once(language.optimiser)),
        flow=replace(
            flow,
            loop=fewer(flow.loop),
            optimiser=at_once(flow.optimiser),
            guidance_loop=fewer(flow.guidance_loop),
            guidance_optimiser=at_once(flow.guidance_optimiser),
            compile=False,
        ),
    )


class ShapesTraining:
    """The stages of a recipe in a folder; each leaves its result there, where the next one and a second run find it.

    `start` is a checkpoint that an earlier training assembled: its autoencoder and its language model are taken as
    they are, and the flow stage goes on from its transformer.
    """

    def __init__(
        self, folder: Path, recipe: ShapesRecipe, device: str | torch.device = "cpu", start: Path | None = None
    ) -> None:
        if start is not None and not (start / _RECORD).is_file():
            raise ValueError(f"{start} is no checkpoint that this recipe has assembled: there is no {_RECORD} in it")
        self.folder = folder
        self.recipe = recipe
        self.device = torch.device(device)
        self.start = start

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
        recipe = self.recipe
        return picture_pool(self.folder / "pool", recipe.num_pictures, recipe.picture_size, recipe.pool_seed)

    def autoencoder(self) -> None:
        if self.start:
            return
        vae = train_autoencoder(self.pool(), self.recipe.autoencoder, self._run("autoencoder"), self.device)
        vae.save_pretrained(self.folder / "autoencoder" / "vae")

    def decoder(self) -> None:
        if self.start:
            return
        vae = AutoencoderDC.from_pretrained(self._result("autoencoder", "vae"))
        vae = refine_decoder(vae, self.pool(), self.recipe.autoencoder, self._run("decoder"), self.device)
        vae.save_pretrained(self.folder / "decoder" / "vae")

    def language(self) -> None:
        if self.start:
            return
        captions = self.pool().captions
        tokenizer, model = train_language_model(captions, self.recipe.language, self._run("language"), self.device)
        tokenizer.save_pretrained(self.folder / "language" / "tokenizer")
        model.save_pretrained(self.folder / "language" / "text_encoder")

    def flow(self) -> None:
        recipe = self.recipe.flow
        transformer = (
            SanaTransformer2DModel.from_pretrained(self.start / "transformer", torch_dtype=torch.float32)
            if self.start
            else new_transformer(recipe)
        )
        transformer = train_flow(transformer, self._flow_data(), recipe, self._run("flow"), self.device)
        transformer.save_pretrained(self.folder / "flow" / "transformer")

    def guidance(self) -> None:
        teacher = SanaTransformer2DModel.from_pretrained(self._result("flow", "transformer"))
        data = self._flow_data()
        transformer = train_guidance(teacher, data, self.recipe.flow, self._run("guidance"), self.device)
        transformer.save_pretrained(self.folder / "guidance" / "transformer")

    def assemble(self) -> None:
        """Write the checkpoint in diffusers layout, in bfloat16, with a record of how it was made."""
        checkpoint = self.folder / "checkpoint"
        partial = self.folder / "checkpoint.partial"
        shutil.rmtree(partial, ignore_errors=True)
        transformer = SanaTransformer2DModel.from_pretrained(
            self._result("guidance", "transformer"), torch_dtype=torch.bfloat16
        )
        transformer.save_pretrained(partial / "transformer")
        self._vae("decoder", torch.bfloat16).save_pretrained(partial / "vae")
        tokenizer, text_encoder = self._language(torch.bfloat16)
        text_encoder.save_pretrained(partial / "text_encoder")
        tokenizer.save_pretrained(partial / "tokenizer")
        # More of the steps at high noise, where the layout is decided (Esser et al., 2024).
        FlowMatchEulerDiscreteScheduler(shift=_FLOW_SHIFT).save_pretrained(partial / "scheduler")
        for component in ("transformer", "vae"):
            _forget_origin(partial / component / "config.json")
        _write_json(partial / "model_index.json", _model_index())
        _write_json(partial / _RECORD, self._record())
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)

    def _record(self) -> dict[str, Any]:
        """The settings, versions and losses that made the checkpoint."""
        logs = {stage: self._run(stage) / "log.jsonl" for stage in STAGES[3 if self.start else 0 : -1]}
        pictures = self.pool().pictures[:512]
        return {
            "command": "sana-sprint train shapes" + (" --start-from CHECKPOINT" if self.start else ""),
            "started_from": json.loads((self.start / _RECORD).read_text(encoding="utf-8")) if self.start else None,
            "recipe": asdict(self.recipe),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
            },
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "device": str(self.device),
            },
            "reconstruction_decibels": round(peak_signal_to_noise(self._vae("decoder", torch.float32), pictures), 2),
            "losses": {stage: _thinned(path) for stage, path in logs.items()},
        }

    def _vae(self, stage: str, dtype: torch.dtype) -> AutoencoderDC:
        folder = self.start / "vae" if self.start else self._result(stage, "vae")
        return AutoencoderDC.from_pretrained(folder, torch_dtype=dtype).eval()

    def _language(self, dtype: torch.dtype) -> tuple[GemmaTokenizer, Gemma2Model]:
        tokenizer = self.start / "tokenizer" if self.start else self._result("language", "tokenizer")
        text_encoder = self.start / "text_encoder" if self.start else self._result("language", "text_encoder")
        return GemmaTokenizer.from_pretrained(tokenizer), Gemma2Model.from_pretrained(text_encoder, dtype=dtype)

    def _flow_data(self) -> FlowData:
        """Latents and text features of the pool; computed once, then read from the folder."""
        cache = self.folder / "flow" / "data.pt"
        if not cache.exists():
            pool, vae = (
                self.pool(),
                self._vae("autoencoder", torch.float32).to(self.device, memory_format=torch.channels_last),
            )
            latents = encode_pictures(vae, pool.pictures) * vae.config.scaling_factor
            tokenizer, text_encoder = self._language(torch.float32)
            captions, masks = encode_captions(tokenizer, text_encoder, pool.captions, self.recipe.max_caption_tokens)
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cache, lambda partial: torch.save((latents, captions, masks), partial))
        return FlowData(*torch.load(cache, weights_only=True))

    def _run(self, stage: str) -> Path:
        """Where the state and the log of a stage are."""
        return self.folder / stage / "run"

    def _result(self, stage: str, name: str) -> Path:
        path = self.folder / stage / name
        if not path.is_dir():
            raise ValueError(f"stage {stage!r} has left no result in {path}: run it first")
        return path


def _forget_origin(config: Path) -> None:
    """Take out where the weights were loaded from, which is of this machine alone."""
    content = json.loads(config.read_text(encoding="utf-8"))
    _write_json(config, {name: value for name, value in content.items() if name != "_name_or_path"})


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "SanaSprintPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }


def _thinned(log: Path, most: int = 60) -> list[dict[str, Any]]:
    """At most `most` entries of a log, evenly apart, the last one among them."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stride = max(1, -(-len(entries) // most))
    return entries[::-1][::stride][::-1]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
