"""A folder saved by either library, loaded by the other: same files, same config, same output."""

import json
from typing import Any

import diffusers
import pytest
import torch

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.transformer.model import SanaTransformer2DModel

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 6,
    "sample_size": 4,
    "interpolation_scale": 1.0,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
AUTOENCODER: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "decoder_norm_types": ("batch_norm", "rms_norm"),
    "scaling_factor": 0.41407,
}
KINDS = {
    "transformer": (SanaTransformer2DModel, diffusers.SanaTransformer2DModel, TRANSFORMER),
    "autoencoder": (AutoencoderDC, diffusers.AutoencoderDC, AUTOENCODER),
}


def output_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(2, 3, 8, 6, generator=generator)
    latents, caption = torch.randn(2, 4, 4, 5, generator=generator), torch.randn(2, 3, 6, generator=generator)
    with torch.no_grad():
        if type(model).__name__ == "AutoencoderDC":
            return model(pictures).sample
        return model(latents, caption, torch.tensor([0.2, 0.7]), guidance=torch.tensor([0.4, 0.5])).sample


@pytest.mark.parametrize("direction", ["ours_to_theirs", "theirs_to_ours"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_in_the_other_library(paired, difference, tmp_path, kind, direction):
    ours, theirs, config = KINDS[kind]
    model, reference = paired(ours, theirs, config)
    saved, reader = (model, theirs) if direction == "ours_to_theirs" else (reference, ours)
    saved.save_pretrained(tmp_path)
    loaded, report = reader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is reader
    assert not any(report.values()), report
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    # Two implementations in float32; 1e-4 as for the autoencoder, the less exact of the two.
    assert difference(output_of(loaded), output_of(saved)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_both_libraries_write_the_same_files_and_config(paired, tmp_path, kind):
    ours, theirs, config = KINDS[kind]
    configs = []
    for name, model in zip(("ours", "theirs"), paired(ours, theirs, config), strict=True):
        model.save_pretrained(tmp_path / name)
        configs.append(json.loads((tmp_path / name / "config.json").read_text()))
    assert configs[0] == configs[1]
    assert configs[0]["_class_name"] == ours.__name__
    assert len({frozenset(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "theirs")}) == 1
