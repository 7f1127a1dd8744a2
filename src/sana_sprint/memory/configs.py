"""A model's name to the configs of its networks; nothing but JSON is read or fetched."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, Gemma2Config, PretrainedConfig

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.pipelines.images import Canvas, choose_canvas
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.multi_control import SanaMultiControlNetModel

# What the published Sprint models have in common, beyond the defaults of the classes.
_SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "sample_size": 32}
_SMALL = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_AUTOENCODER = {
    "encoder_block_types": _STAGES,
    "decoder_block_types": _STAGES,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}

# The transformers of the published models, which are planned for without asking the hub. Their autoencoder is DC-AE
# f32c32 of SANA 1.1, their text encoder Gemma-2-2B, which is what transformers' config is by default.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": _SPRINT,
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": {**_SPRINT, **_SMALL},
}


def _bits_of(settings: Mapping[str, Any]) -> int:
    """Of quantised weights: bitsandbytes and others say them; of torchao and Quanto, the name of the numbers does."""
    if settings.get("quant_method", "bitsandbytes") == "bitsandbytes":
        return 8 if settings.get("load_in_8bit") else 4
    if "bits" in settings:  # of GPTQ and AWQ
        return 8 if settings["bits"] > 4 else 4
    named = re.search(r"(?:int|float|fp)(\d)", f"{settings.get('quant_type')} {settings.get('weights_dtype')}".lower())
    # 16 is more than any of them takes.
    return 16 if named is None else 8 if int(named[1]) > 4 else 4


@dataclass(frozen=True)
class PipelineConfigs:
    """What the networks of a pipeline are.

    Attributes:
        controlnet: the config of a ControlNet, or of several as one network; for one that there is no config of, the
            number of the transformer's blocks that it copies. None for a pipeline without.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: PretrainedConfig
    controlnet: dict[str, Any] | int | None = None

    # Without an entry, what the classes have, which is what is published.

    @property
    def _cell_size(self) -> int:
        """Pixels of a side of what one latent cell shows."""
        return 2 ** (len(self.vae.get("encoder_block_out_channels", (None,) * 6)) - 1)

    @property
    def picture_size(self) -> int:
        """Pixels of a side of the pictures that the model was trained on."""
        return self.transformer.get("sample_size", 32) * self._cell_size

    @property
    def size_multiple(self) -> int:
        """Height and width that are drawn are multiples of so many pixels."""
        return self.transformer.get("patch_size", 1) * self._cell_size

    def canvas(self, height: int | None, width: int | None, use_resolution_binning: bool = True) -> Canvas:
        """The size that a call draws for the one asked for, None for the model's own; ValueError as the call."""
        return choose_canvas(
            height,
            width,
            native_size=self.picture_size,
            multiple=self.size_multiple,
            use_bins=use_resolution_binning,
        )

    def stored_bits(self) -> dict[str, int]:
        """Bits of the weights of those networks that are quantised in the checkpoint already."""
        settings = {
            "transformer": self.transformer.get("quantization_config"),
            "text_encoder": getattr(self.text_encoder, "quantization_config", None),
            "controlnet": self.controlnet.get("quantization_config") if isinstance(self.controlnet, dict) else None,
        }
        return {name: _bits_of(found) for name, found in settings.items() if found}


def read_configs(model: str | os.PathLike, **hub: Any) -> PipelineConfigs:
    """The configs of a pipeline: a folder, one of `PUBLISHED`, or another id on the hub.

    Args:
        model: the pipeline.
        hub: options of `from_pretrained` that say how it is fetched, such as `revision` and `cache_dir`.

    Raises:
        OSError: if there is no such folder or model.
    """
    if str(model) in PUBLISHED and not os.path.isdir(model) and hub.get("revision") is None:
        return PipelineConfigs(PUBLISHED[str(model)], _AUTOENCODER, Gemma2Config())
    return PipelineConfigs(
        transformer=SanaTransformer2DModel.load_config(model, subfolder="transformer", **hub),
        vae=AutoencoderDC.load_config(model, subfolder="vae", **hub),
        text_encoder=AutoConfig.from_pretrained(model, subfolder="text_encoder", **hub),
    )


def controlnet_class(config: Mapping[str, Any]) -> type[SanaControlNetModel] | type[SanaMultiControlNetModel]:
    """What a ControlNet's config, or that of several, is of; ValueError for that of another network."""
    classes = {one.__name__: one for one in (SanaControlNetModel, SanaMultiControlNetModel)}
    name = config.get("_class_name")
    if name not in classes:
        raise ValueError(f"a ControlNet must be a {' or a '.join(classes)}, got a {name}")
    return classes[name]


def read_controlnet(model: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """The config of a ControlNet: its folder or its id on the hub, or a subfolder of either; `hub` as above.

    Raises:
        OSError: if there is no such folder or ControlNet.
        ValueError: if it is another network's.
    """
    config = SanaControlNetModel.load_config(model, subfolder=subfolder, **hub)
    controlnet_class(config)
    return config
