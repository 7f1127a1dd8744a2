"""Image to image: what strength means, where pictures go, latents in the place of pictures, and what is refused.

The tests that name a number or letter in their comment are about that entry of the list of defects found upstream.
"""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from sana_sprint import (
    SanaSprintImg2ImgPipeline,
    SanaSprintInpaintPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    embedded_checkpoint,
)

CIRCLE = "a red circle"
STAR = "a small green star"
# The same numbers in a batch of another size: sums of at most 64 numbers of unit scale in another order.
BATCHED = {"atol": 1e-5, "rtol": 1e-5}
STRENGTHS = [tenth / 10 for tenth in range(11)]


@pytest.fixture(scope="module")
def embedded() -> SanaSprintImg2ImgPipeline:
    """The embedded checkpoint, stepped through angles whatever it was trained for."""
    pipe = SanaSprintImg2ImgPipeline.from_pretrained(embedded_checkpoint(), scheduler=SCMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def angles_of(pipe, **arguments) -> list[float]:
    """The timesteps that a call visits."""
    visited = []
    pipe(**arguments, callback_on_step_end=lambda *given: visited.append(float(given[2])))
    return visited


# 4, A3
@pytest.mark.parametrize(
    ("steps", "strength", "angles"),
    [
        (1, 0.25, [0.3927]),
        (2, 0.25, [0.65]),
        (2, 0.5, [1.3]),
        (2, 0.6, [1.35416, 1.3]),
        (2, 1.0, [1.5708, 1.3]),
        (3, 1 / 3, [0.6]),
        (3, 2 / 3, [1.3, 0.6]),
        (4, 0.875, [1.434148, 1.3, 1.1, 0.6]),
        (4, 0.75, [1.3, 1.1, 0.6]),
        (4, 0.0, []),
    ],
)
def test_strength_is_a_place_in_the_timetable_interpolated_between_its_angles(
    img2img, short, pictures, steps, strength, angles
):
    visited = angles_of(
        img2img, prompt=CIRCLE, image=pictures[0], strength=strength, num_inference_steps=steps, **short
    )
    assert visited == pytest.approx(angles, abs=1e-6)
    assert img2img.num_timesteps == len(angles)


def test_strength_is_a_place_in_a_callers_own_timetable_too(img2img, short, pictures):
    asked = {"prompt": CIRCLE, "image": pictures[0], "timesteps": [1.5, 1.0, 0.2], **short}
    assert angles_of(img2img, strength=0.75, **asked) == pytest.approx([1.25, 1.0])
    assert angles_of(img2img, strength=0.25, **asked) == pytest.approx([0.6])


# 4, A3
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_black_and_white_inputs_differ_at_every_strength_below_1(img2img, short, seeded, steps):
    for strength in [*STRENGTHS[:-1], 0.99]:
        black, white = (
            img2img(
                CIRCLE,
                image=torch.full((3, 64, 64), value),
                strength=strength,
                num_inference_steps=steps,
                **short,
                generator=seeded(0),
            ).images
            for value in (0.0, 1.0)
        )
        assert (black - white).abs().max() > 1e-3, strength


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_distance_from_the_input_grows_with_strength(embedded, steps):
    draw = SanaSprintPipeline.from_pipe(embedded)
    draw.set_progress_bar_config(disable=True)
    seeds = range(64)
    asked = {"output_type": "pt", "num_inference_steps": 4}
    inputs = draw(
        [CIRCLE] * len(seeds), generator=[torch.Generator().manual_seed(100 + seed) for seed in seeds], **asked
    )
    distances = []
    for strength in STRENGTHS:
        drawn = embedded(
            [STAR] * len(seeds),
            image=inputs.images,
            strength=strength,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **{**asked, "num_inference_steps": steps},
        ).images
        distances.append(float((drawn - inputs.images).square().mean().sqrt()))
    # Of pixels in [0, 1], over 64 pictures. Where each is redrawn altogether, their distances only scatter.
    assert all(later > earlier - 0.02 for earlier, later in pairwise(distances)), distances
    assert all(later > earlier for earlier, later in pairwise(distances[::5])), distances
    assert distances[-1] > 3 * distances[1]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_black_and_white_inputs_differ_with_the_embedded_checkpoint(embedded, steps):
    for strength in STRENGTHS[:-1]:
        black, white = (
            embedded(
                STAR,
                image=torch.full((3, 64, 64), value),
                strength=strength,
                num_inference_steps=steps,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
            for value in (0.0, 1.0)
        )
        assert (black - white).abs().max() > 0.1, strength


@pytest.mark.parametrize(
    "asked",
    [
        {"num_inference_steps": 1},
        {"num_inference_steps": 2},
        {"num_inference_steps": 4},
        {"timesteps": [1.0, 0.4, 0.0]},
        {"num_images_per_prompt": 2},
    ],
    ids=str,
)
def test_strength_1_is_text_to_image_with_the_same_noise(pipe, img2img, short, seeded, pictures, asked):
    arguments = {"prompt": CIRCLE, **short, **asked}
    plain = pipe(**arguments, generator=seeded(0)).images
    encoded = []
    hook = img2img.vae.encoder.register_forward_pre_hook(lambda *_: encoded.append(True))
    drawn = img2img(**arguments, image=pictures[0], strength=1, generator=seeded(0)).images
    hook.remove()
    assert_close(drawn, plain, atol=0, rtol=0)
    assert not encoded


@pytest.mark.parametrize("timesteps", [None, [1.5, 1.0, 0.3]], ids=str)
def test_strength_0_encodes_and_decodes(img2img, short, pictures, timesteps):
    encoded = img2img.encode_image(pictures[0], 64, 64)
    drawn = img2img(CIRCLE, image=pictures[0], strength=0, timesteps=timesteps, **short).images
    assert_close(drawn, encoded, atol=1e-6, rtol=0)  # times sigma_data and divided by it
    with torch.no_grad():
        decoded = img2img.vae.decode(encoded / img2img.vae.config.scaling_factor, return_dict=False)[0]
    picture = img2img(CIRCLE, image=pictures[0], strength=0, **{**short, "output_type": "pt"}).images
    assert_close(picture, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


# A6, 9
def test_given_latents_are_noise_of_unit_variance_as_in_text_to_image(img2img, short, seeded, pictures):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(0))
    generator = seeded(0)
    torch.randn(1, 4, 8, 8, generator=generator)
    for strength in (0.7, 1.0):
        asked = {"prompt": CIRCLE, "image": pictures[0], "strength": strength, **short}
        drawn = img2img(**asked, generator=seeded(0)).images
        given = img2img(**asked, latents=noise, generator=generator.clone_state()).images
        assert_close(given, drawn, atol=0, rtol=0)


# A2
def test_pictures_stay_with_their_prompts(img2img, short, seeded, pictures):
    asked = {**short, "strength": 0.5, "num_images_per_prompt": 2}
    together = img2img([CIRCLE, STAR], image=pictures[:2], **asked, generator=seeded([0, 1, 2, 3])).images
    alone = [
        img2img(prompt, image=picture, **asked, generator=seeded(seeds)).images
        for prompt, picture, seeds in [(CIRCLE, pictures[0], [0, 1]), (STAR, pictures[1], [2, 3])]
    ]
    assert_close(together, torch.cat(alone), **BATCHED)
    assert (together[1] - together[3]).abs().max() > 1e-2


def test_one_picture_serves_all_prompts_and_each_drawn_picture_may_have_its_own(img2img, short, seeded, pictures):
    asked = {**short, "strength": 0.5}
    shared = img2img([CIRCLE, STAR], image=pictures[0], **asked, generator=seeded([0, 1])).images
    second = img2img(STAR, image=pictures[0], **asked, generator=seeded([1])).images
    assert_close(shared[1:], second, **BATCHED)
    own = img2img(CIRCLE, image=pictures, num_images_per_prompt=3, **asked, generator=seeded([0, 1, 2])).images
    third = img2img(CIRCLE, image=pictures[2], **asked, generator=seeded([2])).images
    assert_close(own[2:], third, **BATCHED)


# B5
def test_latents_as_image_are_not_encoded_again(img2img, short, seeded, pictures):
    encoded = []
    hook = img2img.vae.encoder.register_forward_pre_hook(lambda *given: encoded.append(len(given[1][0])))
    asked = {"prompt": [CIRCLE, STAR], "strength": 0.6, "num_images_per_prompt": 2, **short}
    plain = img2img(image=pictures[:2], **asked, generator=seeded(0)).images
    assert encoded == [2]  # each once, not for each picture that is drawn from it
    latents = img2img.encode_image(pictures[:2], 64, 64)
    assert latents.shape == (2, 4, 8, 8)
    drawn = img2img(image=latents, **asked, generator=seeded(0)).images
    hook.remove()
    assert encoded == [2, 2]
    assert_close(drawn, plain, atol=0, rtol=0)


def test_the_latents_of_a_result_may_be_the_next_input(img2img, short, seeded, pictures):
    first = img2img(CIRCLE, image=pictures[0], **short, generator=seeded(0)).images
    again = img2img(CIRCLE, image=first, strength=0, **short).images
    assert_close(again, first, atol=1e-6, rtol=0)  # times sigma_data and divided by it


def test_a_pipeline_without_autoencoder_draws_from_latents(img2img, tiny_pipeline_parts, short, seeded, pictures):
    bare = SanaSprintImg2ImgPipeline(**{**tiny_pipeline_parts, "vae": None, "scheduler": SCMScheduler()})
    bare.set_progress_bar_config(disable=True)
    bare.vae_scale_factor = img2img.vae_scale_factor  # without an autoencoder it is the published 32
    latents = img2img.encode_image(pictures[0], 64, 64)
    drawn = bare(CIRCLE, image=latents, **short, generator=seeded(0)).images
    assert_close(drawn, img2img(CIRCLE, image=latents, **short, generator=seeded(0)).images, atol=0, rtol=0)
    with pytest.raises(ValueError, match="without vae needs latents as image"):
        bare(CIRCLE, image=pictures[0], **short)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_flow_scheduler_starts_at_a_strength_too(img2img, short, seeded, pictures, steps):
    img2img.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    asked = {"prompt": CIRCLE, "num_inference_steps": steps, **short}
    unchanged = img2img(image=pictures[0], strength=0, **asked).images
    assert_close(unchanged, img2img.encode_image(pictures[0], 64, 64), atol=0, rtol=0)
    for strength in (0.05, 0.5, 0.95):
        one, other = (
            img2img(image=pictures[i], strength=strength, **asked, generator=seeded(0)).images for i in (0, 1)
        )
        assert (one - other).abs().max() > 1e-3, strength


def test_callbacks_see_the_steps_that_are_run_and_their_last_edit_counts(img2img, short, seeded, pictures):
    seen = []

    def nothing(_pipe, index, timestep, tensors):
        seen.append((index, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if index == 1 else None

    asked = {"prompt": CIRCLE, "image": pictures[0], "strength": 0.6, **short}
    drawn = img2img(**asked, generator=seeded(0), callback_on_step_end=nothing).images
    assert drawn.abs().max() == 0
    shape = (1, 4, 8, 8)
    assert seen == [(0, pytest.approx(1.35416), shape), (1, pytest.approx(1.3), shape)]


def test_an_interrupted_call_returns_the_estimate_of_its_last_step(img2img, short, seeded, pictures):
    def stop(pipe, *_):
        pipe._interrupt = True

    asked = {"prompt": CIRCLE, "image": pictures[0], **short}
    stopped = img2img(**asked, strength=0.75, generator=seeded(0), callback_on_step_end=stop).images
    # Another timetable with the same first angle, (1.5708 + 1.3) / 2, from which one step leads to the end.
    alone = img2img(**asked, timesteps=[1.5708, 0.0], strength=1.4354 / 1.5708, generator=seeded(0)).images
    assert_close(stopped, alone, atol=1e-5, rtol=0)  # the angle rounded in another order


def test_bins_draw_from_the_picture_where_it_will_be_seen(img2img, short, pictures):
    """Drawn at 512 pixels in the bin nearest in shape, and cut back: at strength 0 to what was given."""
    config = {**img2img.transformer.config, "sample_size": 64}
    img2img.transformer = type(img2img.transformer).from_config(config).eval()
    latents = img2img.encode_image(pictures[0], 100, 178)
    assert latents.shape == (1, 4, 384 // 8, 672 // 8)
    asked = {**short, "use_resolution_binning": True, "height": 100, "width": 178}
    assert_close(
        img2img(CIRCLE, image=pictures[0], strength=0, **asked).images, latents, atol=1e-6, rtol=0
    )  # times sigma_data and divided by it
    picture = img2img(CIRCLE, image=pictures[0], strength=0, **{**asked, "output_type": "pil"}).images[0]
    assert picture.size == (178, 100)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"image": None}, "image must be a PIL image, an array .* got None"),
        ({"image": []}, "got an empty list"),
        ({"image": "picture.png"}, "got 'picture.png'"),
        ({"image": torch.zeros(1, 3, 0, 64)}, r"got one of shape \(1, 3, 0, 64\)"),
        ({"image": torch.zeros(5, 64, 64)}, "1 to 4 channels, got 5"),
        ({"image": torch.full((3, 64, 64), torch.nan)}, "image must hold values in .* got nan to nan"),
        ({"image": -torch.ones(3, 64, 64)}, "got -1 to -1"),
        ({"image": torch.full((3, 64, 64), 255.0)}, "got 255 to 255"),
        ({"image": torch.zeros(2, 3, 64, 64)}, "one for each of the 1 pictures to draw, got 2"),
        ({"image": torch.zeros(3, 3, 64, 64), "prompt": [CIRCLE] * 2}, "each of the 2 prompts, .* got 3"),
        ({"image": torch.zeros(1, 4, 8, 9)}, r"\(1, 4, 8, 8\), got \(1, 4, 8, 9\)"),
        ({"image": torch.full((1, 4, 8, 8), torch.inf)}, "finite latents"),
        ({"strength": -0.1}, r"strength must lie in \[0, 1\], got -0.1"),
        ({"strength": 1.01}, "got 1.01"),
        ({"strength": float("nan")}, "strength must be a finite number, got nan"),
        ({"strength": None}, "got None"),
        ({"strength": "0.5"}, "got '0.5'"),
        ({"height": 60}, "multiples of 8, got 60x64"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"got \(2, 4, 8, 8\)"),
        ({"max_timesteps": 3.0}, "got 3.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", [SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline])
def test_what_cannot_work_is_refused_before_a_network_runs(
    tiny_pipeline_parts, short, pictures, right_half, kind, asked, says
):
    pipe = kind(**tiny_pipeline_parts)
    mask = {"mask_image": right_half} if kind is SanaSprintInpaintPipeline else {}
    calls = []
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae.encoder, pipe.vae.decoder)
    hooks = [part.register_forward_pre_hook(lambda *_: calls.append(True)) for part in parts]
    with pytest.raises(ValueError, match=says):
        pipe(**{"prompt": CIRCLE, "image": pictures[0], **mask, **short, **asked})
    for hook in hooks:
        hook.remove()
    assert not calls
