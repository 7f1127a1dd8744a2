"""Callbacks after each step: what they are shown, what their edits do, and how they stop a run."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch.testing import assert_close

from sana_sprint.text.encoder import drop_padding

CIRCLE = "a red circle"


@pytest.fixture(params=["SCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def either(pipe, request):
    """The pipeline, once with its own scheduler and once with a flow-matching one."""
    if request.param != "SCMScheduler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipe


def test_a_callback_is_called_after_each_step_with_what_it_asked_for(either, short):
    seen = []

    def note(pipe, index, timestep, tensors):
        seen.append((pipe, index, float(timestep), {name: tuple(one.shape) for name, one in tensors.items()}))
        return {}

    wanted = ["latents", "prompt_embeds", "prompt_attention_mask"]
    either(CIRCLE, **short, callback_on_step_end=note, callback_on_step_end_tensor_inputs=wanted)
    shapes = {"latents": (1, 4, 8, 8), "prompt_embeds": (1, 16, 32), "prompt_attention_mask": (1, 16)}
    steps = enumerate(either.scheduler.timesteps[:2].tolist())
    assert seen == [(either, index, timestep, shapes) for index, timestep in steps]


# A5
def test_latents_that_the_last_callback_returns_are_the_result(either, short, seeded):
    def nothing(_pipe, _index, _timestep, tensors):
        return {"latents": tensors["latents"] * 0}

    latents = either(CIRCLE, **short, generator=seeded(0), callback_on_step_end=nothing).images
    assert latents.abs().max() == 0


# A5, edited in place
def test_latents_that_the_last_callback_edits_in_place_are_the_result(either, short, seeded):
    def nothing(_pipe, _index, _timestep, tensors):
        tensors["latents"].zero_()

    latents = either(CIRCLE, **short, generator=seeded(0), callback_on_step_end=nothing).images
    assert latents.abs().max() == 0


def test_a_callback_that_returns_what_it_was_shown_changes_nothing(either, short, seeded):
    plain = either(CIRCLE, **short, generator=seeded(0)).images
    shown = either(CIRCLE, **short, generator=seeded(0), callback_on_step_end=lambda *given: given[3]).images
    assert_close(shown, plain, atol=0, rtol=0)


# B8
def test_a_callback_that_returns_none_changes_nothing(either, short, seeded):
    plain = either(CIRCLE, **short, generator=seeded(0)).images
    shown = either(CIRCLE, **short, generator=seeded(0), callback_on_step_end=lambda *given: None).images
    assert_close(shown, plain, atol=0, rtol=0)


def test_latents_edited_between_steps_are_what_the_next_step_starts_from(pipe, their_pipe, short, seeded):
    def double(_pipe, index, _timestep, tensors):
        return {"latents": tensors["latents"] * 2} if index == 0 else tensors

    arguments = {"prompt": CIRCLE, **short, "callback_on_step_end": double}
    ours = pipe(**arguments, generator=seeded(0)).images
    theirs = their_pipe(**arguments, generator=seeded(0)).images
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # float32, two steps


def test_text_edited_between_steps_is_what_the_next_step_is_told(pipe, short, seeded):
    other_embeds, other_mask = pipe.encode_prompt("three yellow triangles", max_sequence_length=16)

    def change_the_subject(_pipe, _index, _timestep, _tensors):
        return {"prompt_embeds": other_embeds, "prompt_attention_mask": other_mask}

    changed = pipe(
        CIRCLE,
        **short,
        generator=seeded(0),
        callback_on_step_end=change_the_subject,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "prompt_attention_mask"],
    ).images
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    again = pipe(CIRCLE, **short, generator=seeded(0), callback_on_step_end=change_the_subject).images
    hook.remove()
    assert_close(again, changed, atol=0, rtol=0)
    other_text, no_mask = drop_padding(other_embeds, other_mask)
    assert_close(seen[1]["encoder_hidden_states"], other_text, atol=0, rtol=0)
    assert seen[1]["encoder_attention_mask"] is no_mask is None
    assert not seen[0]["encoder_hidden_states"].equal(other_text)


def test_text_edited_in_place_is_seen_too(pipe, short, seeded):
    def silence(_pipe, _index, _timestep, tensors):
        tensors["prompt_embeds"].zero_()

    arguments = {"prompt": CIRCLE, **short, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    silenced = pipe(**arguments, callback_on_step_end=silence, generator=seeded(0)).images
    assert not silenced.equal(pipe(**arguments, generator=seeded(0)).images)


def test_an_interrupted_call_returns_the_estimate_of_its_last_step(either, short, seeded):
    def stop(pipe, _index, _timestep, _tensors):
        pipe._interrupt = True

    stopped = either(CIRCLE, **short, generator=seeded(0), callback_on_step_end=stop).images
    assert either.interrupt
    # One step from the same first angle or sigma predicts the same clean latents.
    one_step = either(CIRCLE, **short, num_inference_steps=1, generator=seeded(0)).images
    assert not either.interrupt
    assert_close(stopped, one_step, atol=1e-6, rtol=0)  # float32, for the flow by way of other sums


def test_an_interrupted_call_that_was_edited_returns_an_estimate_and_no_noise(either, short, seeded):
    def edit_and_stop(pipe, _index, _timestep, tensors):
        pipe._interrupt = True
        return {"latents": tensors["latents"] + 5}

    stopped = either(CIRCLE, **short, generator=seeded(0), callback_on_step_end=edit_and_stop).images
    one_step = either(CIRCLE, **short, num_inference_steps=1, generator=seeded(0)).images
    assert_close(stopped, one_step, atol=1e-6, rtol=0)  # as above


class Halve(PipelineCallback):
    """Halves the latents after each step."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2}


@pytest.mark.parametrize("callback", [Halve(), MultiPipelineCallbacks([Halve()])], ids=["one", "several"])
def test_diffusers_callback_objects_name_their_tensors_themselves(pipe, short, seeded, callback):
    plain = pipe(CIRCLE, **short, num_inference_steps=1, generator=seeded(0)).images
    halved = pipe(
        CIRCLE,
        **short,
        num_inference_steps=1,
        generator=seeded(0),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images
    assert_close(halved * 2, plain, atol=1e-6, rtol=0)  # a float32 product by sigma_data = 0.5 is exact


def test_the_progress_bar_counts_the_steps_and_can_be_disabled(pipe, short, capsys):
    pipe.set_progress_bar_config(ncols=60)
    pipe(CIRCLE, **short, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(CIRCLE, **short, num_inference_steps=3)
    assert capsys.readouterr().err == ""


def test_calls_under_inference_mode_can_be_edited_too(pipe, short, seeded):
    with torch.inference_mode():
        latents = pipe(
            CIRCLE,
            **short,
            generator=seeded(0),
            callback_on_step_end=lambda *given: {"latents": given[3]["latents"] * 0},
        ).images
    assert latents.abs().max() == 0
