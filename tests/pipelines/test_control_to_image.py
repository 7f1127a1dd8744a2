"""Pictures after drawings: ControlNets in text to image and image to image, one or several, when and how much."""

from copy import deepcopy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from control_calls import BASES, ring, runs_of
from PIL import Image, ImageDraw
from tiny_control import open_control
from torch.testing import assert_close

from sana_sprint import (
    SanaControlNetModel,
    SanaSprintControlNetImg2ImgPipeline,
    SanaSprintImg2ImgPipeline,
    SanaTransformer2DModel,
)

CIRCLE = "a red circle"


@pytest.fixture
def pipe(make_controlled):
    """Text to image with an open ControlNet."""
    return make_controlled()


def test_an_untrained_controlnet_changes_nothing(control_kind, make_controlled, beginning, sketch):
    pipe = make_controlled(control_kind)
    pipe.controlnet = SanaControlNetModel.from_transformer(pipe.transformer, num_layers=1)
    assert torch.equal(sketch(pipe, **beginning), sketch(make_controlled(BASES[control_kind]), **beginning))


def test_a_trained_one_changes_the_picture_with_its_drawing_and_its_scale(
    control_kind, make_controlled, beginning, sketch
):
    pipe = make_controlled(control_kind)
    drawn = [sketch(make_controlled(BASES[control_kind]), **beginning)]
    drawn += [sketch(pipe, **beginning, controlnet_conditioning_scale=scale) for scale in (0.5, 1.0, -1)]
    drawn.append(sketch(pipe, **beginning, control_image=Image.new("RGB", (64, 64), "white")))
    for index, one in enumerate(drawn):
        assert all((one - other).abs().max() > 1e-3 for other in drawn[:index])


@pytest.mark.parametrize(
    "off", [{"controlnet_conditioning_scale": 0}, {"control_guidance_start": 0.6}, {"control_guidance_end": 0.4}]
)
def test_a_controlnet_that_never_counts_is_not_run_and_the_picture_is_the_base_models(
    control_kind, make_controlled, beginning, sketch, off, caplog
):
    pipe = make_controlled(control_kind)
    runs, encoded = runs_of(pipe.controlnet), runs_of(pipe.vae.encoder)
    assert torch.equal(sketch(pipe, **beginning, **off), sketch(make_controlled(BASES[control_kind]), **beginning))
    assert runs == []
    assert len(encoded) == len(beginning) // 2  # of the picture only
    # Who asks for a scale of 0 knows it.
    told = ["a drawing has no effect" in record.getMessage() for record in caplog.records]
    assert told == [True] * ("controlnet_conditioning_scale" not in off)


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0, 1, [0, 1, 2, 3]), (0, 0.5, [0, 1]), (0.25, 0.75, [1, 2]), (0.2, 0.8, [1, 2])]
)
def test_a_controlnet_runs_in_the_steps_between_start_and_end(pipe, sketch, start, end, steps):
    shown, every = runs_of(pipe.controlnet), runs_of(pipe.transformer)
    sketch(
        pipe,
        num_inference_steps=4,
        intermediate_timesteps=None,
        control_guidance_start=start,
        control_guidance_end=end,
    )
    times = [float(kwargs["timestep"][0]) for _, kwargs in every]
    assert [times.index(float(kwargs["timestep"][0])) for _, kwargs in shown] == steps
    residuals = [kwargs["controlnet_block_samples"] is not None for _, kwargs in every]
    assert residuals == [step in steps for step in range(4)]


def test_the_picture_is_that_of_diffusers_pipeline_for_a_flow_model(tiny_pipeline_parts, make_controlled, sketch):
    config = {**tiny_pipeline_parts["transformer"].config, "guidance_embeds": False, "qk_norm": None, "num_layers": 4}
    torch.manual_seed(2)
    transformer = diffusers.SanaTransformer2DModel.from_config(config).eval()
    controlnet = diffusers.SanaControlNetModel.from_config({**config, "num_layers": 2}).eval()
    for parameter in (*controlnet.input_block.parameters(), *controlnet.controlnet_blocks.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    # diffusers' pipeline changes its tokenizer.
    theirs = diffusers.SanaControlNetPipeline(**deepcopy({**tiny_pipeline_parts, **parts}), controlnet=controlnet)
    theirs.set_progress_bar_config(disable=True)
    ours = make_controlled(controlnet=controlnet, **parts)
    # Its timesteps are sigmas times 1000, which the network is told; ours is told sigmas.
    theirs.scheduler.register_to_config(num_train_timesteps=1)
    ours.scheduler.register_to_config(num_train_timesteps=1)
    times = [1.0, 0.6, 0.2]
    common = {"guidance_scale": 1.0, "controlnet_conditioning_scale": 0.8}
    wanted = sketch(theirs, sigmas=times, num_inference_steps=3, **common)
    found = sketch(ours, timesteps=times, max_timesteps=None, intermediate_timesteps=None, **common)
    # Two implementations in float32, through a network called three times.
    assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    free = sketch(theirs, sigmas=times, num_inference_steps=3, guidance_scale=1.0, controlnet_conditioning_scale=0.0)
    assert (wanted - free).abs().max() > 0.01 * wanted.abs().max()


def test_residuals_may_go_before_the_blocks_in_a_transformer_of_ours_only(pipe, make_controlled, sketch):
    control = open_control(pipe.transformer, residual_placement="before").eval()
    drawn = sketch(make_controlled(controlnet=control))
    assert (drawn - sketch(pipe)).abs().max() > 1e-3
    transformer = diffusers.SanaTransformer2DModel.from_config(pipe.transformer.config).eval()
    with pytest.raises(ValueError, match="residual_placement"):
        sketch(make_controlled(controlnet=control, transformer=transformer))


def test_several_controlnets_count_each_with_its_scale_and_its_steps(pipe, make_controlled, sketch):
    other = open_control(pipe.transformer, seed=5).eval()
    both = make_controlled(controlnet=[pipe.controlnet, other])
    images = [ring(), Image.new("RGB", (64, 64), "white")]

    def drawn(scales: Any, **arguments: Any) -> torch.Tensor:
        return sketch(both, control_image=images, controlnet_conditioning_scale=scales, **arguments)

    first = sketch(pipe, controlnet_conditioning_scale=0.7)
    second = sketch(make_controlled(controlnet=other), control_image=images[1])
    runs = runs_of(other)
    assert torch.equal(drawn([0.7, 0]), first)
    assert torch.equal(drawn([0.7, 1.0], control_guidance_start=[0, 0.6]), first)
    assert runs == []
    assert torch.equal(drawn([0, 1.0]), second)
    together = drawn(1.0)
    assert all((together - one).abs().max() > 1e-3 for one in (first, second, drawn([1.0, -1.0])))


def test_two_equal_controlnets_of_half_the_scale_are_one(pipe, make_controlled, sketch):
    both = make_controlled(controlnet=[pipe.controlnet, deepcopy(pipe.controlnet)])
    halves = sketch(both, control_image=[ring(), ring()], controlnet_conditioning_scale=0.5)
    assert torch.equal(halves, sketch(pipe))  # halving and adding two equal numbers are exact


def test_a_drawing_is_encoded_once_while_it_is_unchanged(pipe, sketch):
    runs = runs_of(pipe.vae.encoder)
    first = sketch(pipe, num_inference_steps=3, intermediate_timesteps=None)
    assert len(runs) == 1
    again = sketch(pipe, num_inference_steps=3, intermediate_timesteps=None, control_image=ring().copy())
    assert len(runs) == 1
    assert torch.equal(first, again)
    changed = ring()
    changed.putpixel((5, 5), (1, 0, 0))
    sketch(pipe, control_image=changed)
    assert len(runs) == 2
    sketch(pipe, height=128)
    assert len(runs) == 3
    sketch(pipe)
    assert len(runs) == 3


def test_a_drawing_that_is_edited_in_place_is_encoded_again(pipe, make_controlled, sketch):
    pixels = torch.from_numpy(np.asarray(ring()).copy()).permute(2, 0, 1)
    sketch(pipe, control_image=pixels)
    pixels[:, 20:40] = 255
    assert torch.equal(sketch(pipe, control_image=pixels), sketch(make_controlled(), control_image=pixels))


@torch.no_grad()
def test_a_drawing_is_encoded_again_once_the_autoencoder_has_changed(pipe, make_controlled, sketch):
    runs = runs_of(pipe.vae.encoder)
    for change in (
        lambda: pipe.vae.encoder.conv_out.weight.mul_(1.5),
        lambda: pipe.vae.to(torch.bfloat16),
        lambda: pipe.vae.register_to_config(scaling_factor=1.0),
        lambda: pipe.vae.enable_tiling(),
        lambda: pipe.drawing_cache.clear(),
    ):
        sketch(pipe)
        before = len(runs)
        change()
        found = sketch(pipe)
        assert len(runs) == before + 1
        assert torch.equal(found, sketch(make_controlled(controlnet=pipe.controlnet, vae=pipe.vae)))
        runs.clear()
    pipe.drawing_cache = None
    sketch(pipe)
    sketch(pipe)
    assert len(runs) == 2


def test_what_is_kept_of_an_autoencoder_does_not_serve_another(pipe, make_controlled, sketch):
    sketch(pipe)
    torch.manual_seed(3)
    pipe.vae = type(pipe.vae).from_config(pipe.vae.config).eval()
    assert torch.equal(sketch(pipe), sketch(make_controlled(vae=pipe.vae)))


def test_no_more_than_the_last_drawings_are_kept(pipe, sketch):
    pipe.drawing_cache = type(pipe.drawing_cache)(max_drawings=1)
    runs = runs_of(pipe.vae.encoder)
    for image in (ring(), Image.new("RGB", (64, 64)), ring()):
        sketch(pipe, control_image=image)
    assert len(runs) == 3


def test_a_drawing_may_be_an_image_an_array_a_tensor_or_latents(pipe, make_controlled, sketch):
    expected = sketch(pipe)
    array = np.asarray(ring())
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    latents = make_controlled(SanaSprintImg2ImgPipeline).encode_image(ring(), 64, 64, use_resolution_binning=False)
    for drawing in (array, array / 255, tensor, tensor[None] / 255, [ring()], ring().convert("L"), latents):
        assert_close(sketch(pipe, control_image=drawing), expected, atol=1e-5, rtol=0)  # 1/255 in float32 or float64


def test_a_drawing_of_any_size_is_fitted_as_pictures_are(pipe, make_controlled, sketch):
    large = ring(150).resize((150, 100))
    latents = make_controlled(SanaSprintImg2ImgPipeline).encode_image(large, 128, 64, use_resolution_binning=False)
    assert torch.equal(sketch(pipe, height=128, control_image=large), sketch(pipe, height=128, control_image=latents))


def test_latents_need_no_autoencoder_and_are_not_cached(pipe, make_controlled, sketch):
    latents = make_controlled(SanaSprintImg2ImgPipeline).encode_image(ring(), 64, 64, use_resolution_binning=False)
    expected = sketch(pipe)
    pipe.vae = None
    assert torch.equal(sketch(pipe, control_image=latents), expected)
    with pytest.raises(ValueError, match="without vae needs latents as control_image"):
        sketch(pipe)


def test_drawings_belong_to_their_prompts_and_pictures(pipe, short, seeded):
    prompts, seeds = [CIRCLE, "a blue square"], [0, 1, 2, 3]
    drawings = [ring(), Image.new("RGB", (64, 64), "white")]
    drawn = pipe(prompts, num_images_per_prompt=2, control_image=drawings, **short, generator=seeded(seeds)).images
    for row, seed in enumerate(seeds):
        alone = pipe(prompts[row // 2], control_image=drawings[row // 2], **short, generator=seeded(seed)).images
        assert_close(drawn[row : row + 1], alone, atol=1e-4, rtol=0)  # batched products sum in another order


def test_from_noise_alone_image_to_image_draws_what_text_to_image_does(pipe, make_controlled, pictures, sketch):
    other = make_controlled(SanaSprintControlNetImg2ImgPipeline, controlnet=pipe.controlnet)
    assert torch.equal(sketch(other, image=pictures[0], strength=1), sketch(pipe))
    assert (sketch(other, image=pictures[0], strength=0.5) - sketch(pipe)).abs().max() > 1e-2


def test_guidance_ends_after_a_share_of_the_steps_that_image_to_image_runs(make_controlled, pictures, sketch):
    pipe = make_controlled(SanaSprintControlNetImg2ImgPipeline)
    runs, every = runs_of(pipe.controlnet), runs_of(pipe.transformer)
    sketch(
        pipe,
        image=pictures[0],
        strength=0.5,
        num_inference_steps=4,
        intermediate_timesteps=None,
        control_guidance_end=0.5,
    )
    assert (len(runs), len(every)) == (1, 2)
    runs.clear()
    sketch(pipe, image=pictures[0], strength=0)
    assert runs == []


def bad_numbers() -> list[Any]:
    nan = float("nan")
    return [
        ({"controlnet_conditioning_scale": value}, "controlnet_conditioning_scale")
        for value in (nan, float("inf"), None, "1", [1.0, 1.0])
    ] + [
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "must lie below"),
        ({"control_guidance_start": -0.1}, "must lie below"),
        ({"control_guidance_end": 1.1}, "must lie below"),
        ({"control_guidance_end": nan}, "control_guidance_end"),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"control_image": None}, "control_image must be a PIL image"),
        ({"control_image": []}, "control_image"),
        ({"control_image": Image.new("RGBA", (64, 64))}, "transparency"),
        ({"control_image": Image.new("LA", (64, 64), (0, 255))}, "transparency"),
        ({"control_image": np.zeros((64, 64, 4))}, "transparency"),
        ({"control_image": torch.zeros(2, 64, 64)}, "transparency"),
        ({"control_image": torch.full((3, 64, 64), float("nan"))}, "control_image must hold values"),
        ({"control_image": torch.full((3, 64, 64), 1.5)}, "control_image must hold values"),
        ({"control_image": torch.zeros(5, 64, 64)}, "control_image must have 1 to 4 channels"),
        ({"control_image": Image.new("I", (64, 64))}, "control_image must have 8 bits"),
        ({"control_image": [Image.new("RGB", (64, 64))] * 3}, "control_image must be one, or one for each"),
        ({"control_image": torch.full((1, 4, 8, 8), float("nan"))}, "finite latents"),
        ({"control_image": torch.zeros(1, 4, 9, 8)}, "control_image, as it has the channels of latents"),
        ({"control_image": "drawing.png"}, "control_image must be a PIL image"),
        *bad_numbers(),
    ],
)
def test_what_cannot_work_is_refused_before_any_network_runs(
    control_kind, make_controlled, beginning, sketch, bad, message
):
    pipe = make_controlled(control_kind)
    runs = [runs_of(getattr(pipe, name)) for name in ("text_encoder", "controlnet", "transformer")]
    runs.append(runs_of(pipe.vae.encoder))
    with pytest.raises(ValueError, match=message):
        sketch(pipe, **beginning, **bad)
    assert runs == [[], [], [], []]


@pytest.mark.parametrize(
    "bad",
    [
        {"control_image": ring()},
        {"control_image": [ring()]},
        {"control_image": [ring(), ring()], "controlnet_conditioning_scale": [1.0]},
        {"control_image": [ring(), ring()], "control_guidance_start": [0, 0, 0]},
    ],
)
def test_several_controlnets_want_as_many_drawings_and_numbers(pipe, make_controlled, sketch, bad):
    both = make_controlled(controlnet=[pipe.controlnet, deepcopy(pipe.controlnet)])
    with pytest.raises(ValueError, match="2 ControlNets"):
        sketch(both, **bad)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"in_channels": 8}, "in_channels=4"),
        ({"caption_channels": 16}, "caption_channels=32"),
        ({"num_layers": 2}, "2 blocks"),
    ],
)
def test_a_controlnet_for_another_transformer_is_refused(pipe, sketch, entries, message):
    pipe.controlnet = SanaControlNetModel(**{**pipe.controlnet.config, **entries})
    with pytest.raises(ValueError, match=message):
        sketch(pipe)


def test_a_controlnet_with_guidance_wants_a_transformer_with_it(pipe, sketch):
    pipe.transformer = SanaTransformer2DModel(**{**pipe.transformer.config, "guidance_embeds": False})
    with pytest.raises(ValueError, match="guidance_embeds"):
        sketch(pipe)


def test_a_list_of_controlnets_holds_controlnets(pipe, make_controlled):
    with pytest.raises(ValueError, match="got SanaTransformer2DModel"):
        make_controlled(controlnet=[pipe.controlnet, pipe.transformer])
    with pytest.raises(ValueError, match="empty list"):
        make_controlled(controlnet=[])


def test_a_preview_is_what_the_network_sees(pipe, make_controlled, sketch):
    wide = ring().resize((100, 50))
    (seen,) = pipe.control_preview(wide, height=128, width=64, use_resolution_binning=False)
    assert seen.size == (64, 128)
    found, wanted = (sketch(pipe, control_image=image, height=128) for image in (seen, wide))
    assert_close(found, wanted, atol=1e-2, rtol=0)  # the preview has 8 bits


def test_a_preview_finds_edges_and_refuses_what_calls_refuse(pipe):
    pytest.importorskip("cv2")
    from sana_sprint.conditioning.edges import edges

    filled = Image.new("RGB", (64, 64))
    ImageDraw.Draw(filled).rectangle([16, 16, 47, 47], fill="white")
    (seen,) = pipe.control_preview(filled, "edges", use_resolution_binning=False)
    assert np.array_equal(np.asarray(seen), np.asarray(edges(filled)))
    # Lines of a larger picture are as broad as those: none is made smaller, and grey.
    (seen,) = pipe.control_preview(filled.resize((1024, 1024)), "edges", use_resolution_binning=False)
    assert set(np.unique(seen)) == {0, 255}
    with pytest.raises(ValueError, match="no control is named"):
        pipe.control_preview(filled, "edgy")
    with pytest.raises(ValueError, match="transparency"):
        pipe.control_preview(filled.convert("RGBA"), "edges")
