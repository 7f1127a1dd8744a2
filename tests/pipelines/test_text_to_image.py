"""What diffusers' text-to-image pipeline gets wrong, or refuses to do, and ours does.

The tests that name a number or letter in their comment are about that entry of the list of defects found upstream.
"""

import logging
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from sana_sprint import SanaPipelineOutput, SanaSprintPipeline, SanaTransformer2DModel

ASTRONAUT = "a tiny astronaut hatching from an egg on the moon"
CIRCLE = "a red circle"

# The same numbers in a batch of another size: sums of at most 64 numbers of unit scale in another order.
BATCHED = {"atol": 1e-5, "rtol": 1e-5}


def angles_of(pipe, **arguments) -> list[float]:
    """The timesteps that a call visits."""
    visited = []

    def note(_pipe, _index, timestep, _tensors):
        visited.append(float(timestep))

    pipe(**arguments, callback_on_step_end=note)
    return visited


# 1, A1
def test_images_of_one_prompt_do_not_see_another_prompts_mask(pipe, short, seeded):
    together = pipe([CIRCLE, ASTRONAUT], **short, num_images_per_prompt=2, generator=seeded([0, 1, 2, 3])).images
    first = pipe(CIRCLE, **short, num_images_per_prompt=2, generator=seeded([0, 1])).images
    second = pipe(ASTRONAUT, **short, num_images_per_prompt=2, generator=seeded([2, 3])).images
    assert_close(together, torch.cat([first, second]), **BATCHED)


# 1, A1, with embeddings and masks given
def test_given_masks_are_repeated_in_the_order_of_given_embeddings(pipe):
    embeds, mask = pipe.encode_prompt([CIRCLE, ASTRONAUT], max_sequence_length=16)
    repeated, repeated_mask = pipe.encode_prompt(
        None, num_images_per_prompt=2, prompt_embeds=embeds, prompt_attention_mask=mask
    )
    assert_close(repeated, embeds[[0, 0, 1, 1]], atol=0, rtol=0)
    assert_close(repeated_mask, mask[[0, 0, 1, 1]], atol=0, rtol=0)


# the same claim against diffusers, which is right for one prompt
def test_each_of_several_prompts_gives_what_diffusers_gives_for_it_alone(pipe, their_pipe, short, seeded):
    ours = pipe([CIRCLE, ASTRONAUT], **short, num_images_per_prompt=2, generator=seeded([0, 1, 2, 3])).images
    theirs = [
        their_pipe(prompt, **short, num_images_per_prompt=2, generator=seeded(seeds)).images
        for prompt, seeds in [(CIRCLE, [0, 1]), (ASTRONAUT, [2, 3])]
    ]
    assert_close(ours, torch.cat(theirs), **BATCHED)


# 2, B2
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_every_number_of_steps_works_with_nothing_else_set(pipe, short, steps):
    angles = angles_of(pipe, prompt=CIRCLE, num_inference_steps=steps, **short)
    assert len(angles) == pipe.num_timesteps == steps
    assert all(later < earlier for earlier, later in pairwise(angles))


# Table 7 of the paper
def test_four_steps_visit_the_angles_of_the_paper(pipe, short):
    angles = angles_of(pipe, prompt=CIRCLE, num_inference_steps=4, **short)
    assert angles == pytest.approx([1.568296, 1.3, 1.1, 0.6], abs=1e-6)  # printed to six places


# 3, B1
def test_custom_timesteps_work_with_nothing_else_set(pipe, short):
    asked = [1.57, 1.4, 0.9, 0.3, 0.0]
    assert angles_of(pipe, prompt=CIRCLE, timesteps=asked, **short) == pytest.approx(asked[:-1])


def test_custom_timesteps_may_be_what_the_number_of_steps_says(pipe, short):
    asked = [1.57, 1.4, 0.9, 0.0]
    assert angles_of(pipe, prompt=CIRCLE, timesteps=asked, num_inference_steps=3, **short) == pytest.approx(asked[:-1])
    assert len(angles_of(pipe, prompt=CIRCLE, timesteps=asked, num_inference_steps=None, **short)) == 3
    with pytest.raises(ValueError, match="num_inference_steps=4"):
        pipe(CIRCLE, timesteps=asked, num_inference_steps=4, **short)


def test_custom_timesteps_equal_to_the_timetable_give_the_same_picture(pipe, short, seeded):
    by_number = pipe(CIRCLE, **short, generator=seeded(0)).images
    by_angles = pipe(CIRCLE, timesteps=[1.57080, 1.3, 0.0], **short, generator=seeded(0)).images
    assert_close(by_angles, by_number, atol=0, rtol=0)


def test_an_angle_that_cannot_apply_is_refused_only_if_asked_for(pipe, short):
    with pytest.raises(ValueError, match="intermediate_timesteps=1.3"):
        pipe(CIRCLE, num_inference_steps=4, intermediate_timesteps=float("1.3"), **short)
    with pytest.raises(ValueError, match="max_timesteps"):
        pipe(CIRCLE, timesteps=[1.5, 0.0], max_timesteps=float("1.57080"), **short)


# 9: kept as upstream's text to image has it
def test_given_latents_are_noise_of_unit_variance(pipe, short, seeded):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(0))
    # After the first draw the generators are where they would be had each drawn its own.
    generator = seeded(0)
    torch.randn(1, 4, 8, 8, generator=generator)
    drawn = pipe(CIRCLE, **short, generator=seeded(0)).images
    assert_close(pipe(CIRCLE, **short, latents=noise, generator=generator).images, drawn, atol=0, rtol=0)


# A8
def test_from_pipe_leaves_the_shared_components_as_they_are(tiny_pipeline_parts):
    parts = {**tiny_pipeline_parts, "transformer": deepcopy(tiny_pipeline_parts["transformer"]).to(torch.bfloat16)}
    pipe = SanaSprintPipeline(**parts)
    other = SanaSprintPipeline.from_pipe(pipe)
    assert other.components == pipe.components
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def test_from_pipe_casts_to_a_dtype_that_is_asked_for(tiny_pipeline_parts):
    parts = {name: deepcopy(part) for name, part in tiny_pipeline_parts.items()}
    other = SanaSprintPipeline.from_pipe(SanaSprintPipeline(**parts), dtype=torch.bfloat16)
    assert {other.transformer.dtype, other.vae.dtype, other.text_encoder.dtype} == {torch.bfloat16}


def test_from_pipe_takes_the_components_of_diffusers_pipeline(their_pipe, short):
    pipe = SanaSprintPipeline.from_pipe(their_pipe)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.components == their_pipe.components
    assert pipe(CIRCLE, **short).images.shape == (1, 4, 8, 8)


def test_from_pipe_takes_components_to_use_instead(pipe, their_parts):
    other = SanaSprintPipeline.from_pipe(pipe, transformer=their_parts["transformer"])
    assert other.transformer is their_parts["transformer"]
    assert other.vae is pipe.vae


# A10
def test_a_cut_prompt_is_reported_with_what_was_cut(pipe, short, caplog):
    with caplog.at_level(logging.WARNING, logger="sana_sprint"):
        pipe(["a cat", f"{ASTRONAUT} and more and more"], **{**short, "max_sequence_length": 8})
    assert len(caplog.records) == 1
    assert "max_sequence_length=8" in caplog.text
    assert "and more" in caplog.text


def test_a_prompt_that_fits_is_not_reported(pipe, short, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(CIRCLE, **short)
    assert not caplog.records


# B9
def test_a_transformer_without_guidance_draws_the_same_at_every_guidance_scale(tiny_pipeline_parts, short, seeded):
    torch.manual_seed(2)
    config = tiny_pipeline_parts["transformer"].config
    transformer = SanaTransformer2DModel.from_config(config, guidance_embeds=False).eval()
    pipe = SanaSprintPipeline(**{**tiny_pipeline_parts, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    low, high = (pipe(CIRCLE, **short, guidance_scale=w, generator=seeded(0)).images for w in (1.0, 9.0))
    assert_close(low, high, atol=0, rtol=0)


def test_guidance_changes_the_picture_of_a_transformer_with_guidance(pipe, short, seeded):
    low, high = (pipe(CIRCLE, **short, guidance_scale=w, generator=seeded(0)).images for w in (1.0, 9.0))
    assert (low - high).abs().max() > 1e-3


# C3
def test_sizes_left_out_are_those_the_model_was_trained_on(pipe, short):
    assert pipe(CIRCLE, **{**short, "height": None, "width": None}).images.shape == (1, 4, 8, 8)


def test_num_images_per_prompt_none_is_one(pipe, short):
    assert len(pipe(CIRCLE, **short, num_images_per_prompt=None).images) == 1


def test_sizes_may_be_integers_of_any_library(pipe, short):
    images = pipe(CIRCLE, **{**short, "height": torch.tensor(64), "width": 96.0}).images
    assert images.shape == (1, 4, 8, 12)


# C6
def test_properties_of_a_call_can_be_read_before_the_first(pipe):
    assert pipe.guidance_scale is None
    assert pipe.attention_kwargs is None
    assert pipe.num_timesteps == 0
    assert pipe.interrupt is False


def test_properties_of_a_call_can_be_read_after_it(pipe, short):
    pipe(CIRCLE, **short, guidance_scale=3.0, attention_kwargs={"scale": 1.0})
    assert pipe.guidance_scale == 3.0
    assert pipe.attention_kwargs == {"scale": 1.0}
    assert pipe.num_timesteps == 2


# C9
def test_a_call_leaves_the_tokenizer_as_it_was(pipe, short):
    before = pipe.tokenizer.padding_side, pipe.tokenizer.truncation_side, pipe.tokenizer.model_max_length
    assert before[0] == "left"
    pipe(CIRCLE, **short)
    assert (pipe.tokenizer.padding_side, pipe.tokenizer.truncation_side, pipe.tokenizer.model_max_length) == before


def test_a_pipeline_without_text_encoder_draws_from_embeddings(pipe, tiny_pipeline_parts, short, seeded):
    embeds, mask = pipe.encode_prompt(CIRCLE, max_sequence_length=16)
    bare = SanaSprintPipeline(**{**tiny_pipeline_parts, "text_encoder": None, "tokenizer": None, "vae": None})
    bare.set_progress_bar_config(disable=True)
    bare.vae_scale_factor = pipe.vae_scale_factor  # without an autoencoder it is the published 32
    drawn = bare(**short, prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded(0)).images
    assert_close(drawn, pipe(CIRCLE, **short, generator=seeded(0)).images, atol=0, rtol=0)


def test_an_image_does_not_depend_on_its_batch(pipe, short, seeded):
    batch = pipe([CIRCLE, ASTRONAUT, ""], **short, generator=seeded([5, 6, 7])).images
    alone = pipe(ASTRONAUT, **short, generator=seeded([6])).images
    assert_close(batch[1:2], alone, **BATCHED)


def test_a_call_returns_diffusers_output_class_or_a_tuple(pipe, short):
    from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput as TheirOutput

    output = pipe(CIRCLE, **short)
    assert isinstance(output, TheirOutput)
    assert SanaPipelineOutput is TheirOutput
    assert type(pipe(CIRCLE, **short, return_dict=False)) is tuple


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (2, 64, 96, 3)), ("pt", (2, 3, 64, 96)), ("latent", (2, 4, 8, 12))]
)
def test_every_output_type_has_its_shape(pipe, short, output_type, shape):
    asked = {**short, "output_type": output_type, "width": 96}
    assert tuple(pipe([CIRCLE, ASTRONAUT], **asked).images.shape) == shape


def test_latents_decode_to_the_picture(pipe, short, seeded):
    latents = pipe(CIRCLE, **short, generator=seeded(0)).images
    picture = pipe(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert_close((decoded / 2 + 0.5).clamp(0, 1), picture, atol=0, rtol=0)
