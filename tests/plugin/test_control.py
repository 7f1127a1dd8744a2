"""diffusers' own pipeline for ControlNets, with its classes and with ours in their place."""

from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image, ImageDraw

import sana_sprint

# Two implementations in float32, through a network called three times.
FLOAT32 = 1e-4


@pytest.fixture
def control_folder(tiny_pipeline_parts, tmp_path):
    """A pipeline of diffusers with random weights and a ControlNet that seems to have learnt something."""
    parts = dict(tiny_pipeline_parts)
    config = {**parts["transformer"].config, "guidance_embeds": False, "qk_norm": None, "num_layers": 4}
    torch.manual_seed(2)
    transformer = diffusers.SanaTransformer2DModel.from_config(config)
    control = diffusers.SanaControlNetModel.from_config({**config, "num_layers": 2})
    for parameter in (*control.input_block.parameters(), *control.controlnet_blocks.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    vae = diffusers.AutoencoderDC.from_config(parts["vae"].config)
    pipe = diffusers.SanaControlNetPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=vae,
        transformer=transformer,
        controlnet=control,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.save_pretrained(tmp_path)
    return tmp_path


def latents_of(pipe: Any, scale: float) -> torch.Tensor:
    drawing = Image.new("RGB", (64, 64))
    ImageDraw.Draw(drawing).ellipse([10, 10, 50, 50], outline="white", width=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red circle",
        control_image=drawing,
        controlnet_conditioning_scale=scale,
        height=64,
        width=64,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=16,
        output_type="latent",
    ).images


def test_while_registered_diffusers_controlnet_pipeline_draws_the_same_with_ours(control_folder):
    theirs = diffusers.SanaControlNetPipeline.from_pretrained(control_folder)
    wanted, free = latents_of(theirs, 1.0), latents_of(theirs, 0.0)
    sana_sprint.register()
    try:
        ours = diffusers.SanaControlNetPipeline.from_pretrained(control_folder)
        found = latents_of(ours, 1.0)
    finally:
        sana_sprint.unregister()
    assert type(ours.controlnet) is sana_sprint.SanaControlNetModel
    assert type(ours.transformer) is sana_sprint.SanaTransformer2DModel
    assert type(theirs.controlnet) is not type(ours.controlnet)
    assert (found - wanted).abs().max() < FLOAT32 * wanted.abs().max()
    assert (wanted - free).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.parametrize("name", ["SanaSprintControlNetPipeline", "SanaSprintControlNetImg2ImgPipeline"])
@pytest.mark.parametrize("several", [False, True])
def test_while_registered_diffusers_loads_our_pipelines_with_controlnets(tiny_pipeline_parts, tmp_path, name, several):
    kind = getattr(sana_sprint, name)
    control = sana_sprint.SanaControlNetModel.from_transformer(tiny_pipeline_parts["transformer"], num_layers=1)
    kind(**tiny_pipeline_parts, controlnet=[control, deepcopy(control)] if several else control).save_pretrained(
        tmp_path
    )
    sana_sprint.register()
    try:
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    finally:
        sana_sprint.unregister()
    assert type(loaded) is kind
    wanted = sana_sprint.SanaMultiControlNetModel if several else sana_sprint.SanaControlNetModel
    assert type(loaded.controlnet) is wanted


@pytest.fixture
def folder(tiny_pipeline_parts, tmp_path):
    """A pipeline of text to image."""
    sana_sprint.SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def registered():
    """Registers for one test."""
    sana_sprint.register()
    yield
    sana_sprint.unregister()


AUTOMATIC = [
    ("AutoPipelineForText2Image", "SanaSprintControlNetPipeline", "SanaSprintPipeline"),
    ("AutoPipelineForImage2Image", "SanaSprintControlNetImg2ImgPipeline", "SanaSprintImg2ImgPipeline"),
]


@pytest.mark.parametrize(("automatic", "guided", "free"), AUTOMATIC)
@pytest.mark.parametrize("several", [False, True])
def test_while_registered_automatic_pipelines_take_controlnets(
    registered, folder, tmp_path, automatic, guided, free, several
):
    chooser, guided = getattr(diffusers, automatic), getattr(sana_sprint, guided)
    base = sana_sprint.SanaSprintPipeline.from_pretrained(folder)
    one = sana_sprint.SanaControlNetModel.from_transformer(base.transformer, num_layers=1)
    controlnet = [one, deepcopy(one)] if several else one
    loaded = chooser.from_pretrained(folder, controlnet=controlnet)
    made = chooser.from_pipe(base, controlnet=controlnet)
    assert type(loaded) is type(made) is guided
    assert (list(made.controlnet.nets) if several else made.controlnet) == controlnet
    assert made.transformer is base.transformer
    loaded.save_pretrained(tmp_path / "with")
    assert type(chooser.from_pretrained(tmp_path / "with")) is guided


@pytest.mark.parametrize(("automatic", "guided", "free"), AUTOMATIC)
def test_while_registered_automatic_pipelines_are_made_of_one_another(registered, folder, automatic, guided, free):
    chooser, guided, free = getattr(diffusers, automatic), getattr(sana_sprint, guided), getattr(sana_sprint, free)
    base = sana_sprint.SanaSprintPipeline.from_pretrained(folder)
    one = sana_sprint.SanaControlNetModel.from_transformer(base.transformer, num_layers=1)
    for other in ("SanaSprintControlNetPipeline", "SanaSprintControlNetImg2ImgPipeline"):
        pipe = getattr(sana_sprint, other).from_pipe(base, controlnet=one)
        kept, removed = chooser.from_pipe(pipe), chooser.from_pipe(pipe, controlnet=None)
        assert type(kept) is guided
        assert kept.controlnet is one
        assert type(removed) is free
        assert "controlnet" not in removed.components
        assert removed.transformer is base.transformer


def test_without_registering_automatic_pipelines_have_no_controlnets_of_ours(tiny_pipeline_parts, folder):
    one = sana_sprint.SanaControlNetModel.from_transformer(tiny_pipeline_parts["transformer"], num_layers=1)
    sana_sprint.register()
    sana_sprint.unregister()
    with pytest.raises(ValueError, match="can't find a pipeline linked to SanaSprintControlNetPipeline"):
        diffusers.AutoPipelineForText2Image.from_pretrained(folder, controlnet=one)
