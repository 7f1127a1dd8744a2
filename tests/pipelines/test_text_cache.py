"""A pipeline reads its instruction once, prompts once, and padding never; and draws what it would without."""

from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from sana_sprint import SanaSprintPipeline
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION

CIRCLE = "a red circle"
ASTRONAUT = "a tiny astronaut hatching from an egg on the moon"
# Latents are of unit scale; the text encoder's sums in float32 are taken in another order.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def short(short):
    """Arguments for a short call, with an instruction."""
    return {**short, "complex_human_instruction": list(COMPLEX_HUMAN_INSTRUCTION)}


@pytest.fixture
def own_pipe(tiny_pipeline_parts):
    """A pipeline with components of its own, for tests that alter them."""
    pipeline = SanaSprintPipeline(**{name: deepcopy(part) for name, part in tiny_pipeline_parts.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def lengths(own_pipe):
    """The lengths of the texts that the text encoder has read, one for each time that it ran."""
    lengths: list[int] = []
    embed_tokens = own_pipe.text_encoder.embed_tokens
    embed_tokens.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    return lengths


def test_a_second_call_reads_its_prompt_alone_and_a_repeated_one_nothing(own_pipe, short, lengths):
    own_pipe(CIRCLE, **short)
    instruction, circle = lengths
    assert circle < 16 < instruction
    own_pipe(ASTRONAUT, **short)
    assert circle < lengths[2] < 16
    own_pipe(CIRCLE, **short, num_images_per_prompt=2, guidance_scale=1.0)
    own_pipe(ASTRONAUT, **short, attention_kwargs={"scale": 0.5})
    assert len(lengths) == 3


@pytest.mark.parametrize("prompt", [CIRCLE, "", ASTRONAUT, [CIRCLE, ASTRONAUT, ""]], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_pictures_are_those_drawn_without_the_cache(prompt, number, own_pipe, short, seeded):
    arguments = {"prompt": prompt, **short, "num_images_per_prompt": number}
    kept = [own_pipe(**arguments, generator=seeded(0)).images for _ in range(2)]
    assert torch.equal(*kept)
    own_pipe.text_cache = None
    assert_close(kept[0], own_pipe(**arguments, generator=seeded(0)).images, **CLOSE)


def test_without_the_cache_everything_is_read_in_every_call(own_pipe, short, lengths):
    own_pipe.text_cache = None
    for _ in range(2):
        own_pipe(CIRCLE, **short)
    assert lengths[0] == lengths[1] > len(own_pipe.tokenizer.encode("\n".join(COMPLEX_HUMAN_INSTRUCTION)))


def test_a_lone_prompt_reaches_the_network_without_padding_or_mask(own_pipe, short, lengths):
    seen = []
    hook = own_pipe.transformer.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    own_pipe(CIRCLE, **short)
    alone, together = [CIRCLE], [CIRCLE, ASTRONAUT]
    own_pipe(together, **short)
    hook.remove()
    (first, *_, last), (_, in_circle, in_astronaut) = seen, lengths
    assert first["encoder_attention_mask"] is None
    assert first["encoder_hidden_states"].shape[:2] == (len(alone), 1 + in_circle)
    assert last["encoder_attention_mask"].sum(dim=1).tolist() == [1 + in_circle, 1 + in_astronaut]
    assert last["encoder_hidden_states"].shape[:2] == (len(together), 1 + in_astronaut)


def test_embeddings_have_diffusers_shape_and_nothing_where_they_are_masked(own_pipe, their_pipe):
    prompts = [CIRCLE, ASTRONAUT]
    with torch.no_grad():
        embeds, mask = own_pipe.encode_prompt(prompts, complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION)
        theirs, their_mask = their_pipe.encode_prompt(prompts, complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION)
    assert embeds.shape == theirs.shape == (2, 300, 32)
    assert torch.equal(mask, their_mask)
    assert_close(embeds[mask > 0], theirs[mask > 0], **CLOSE)
    assert not embeds[mask == 0].any()


def test_another_text_encoder_or_tokenizer_is_used_at_once(own_pipe, short, seeded):
    plain = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    own_pipe.text_encoder = deepcopy(own_pipe.text_encoder)
    with torch.no_grad():
        own_pipe.text_encoder.norm.weight += 1
    other = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    own_pipe.text_cache.clear()
    assert torch.equal(own_pipe(CIRCLE, **short, generator=seeded(0)).images, other)
    assert (other - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_text_encoder_reads_again(own_pipe, short, seeded, lengths, dtype):
    own_pipe(CIRCLE, **short)
    own_pipe.text_encoder.to(dtype)
    drawn = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    assert len(lengths) == 4
    own_pipe.text_cache.clear()
    assert torch.equal(own_pipe(CIRCLE, **short, generator=seeded(0)).images, drawn)


def test_text_that_a_callback_edits_in_place_is_whole_again_in_the_next_call(own_pipe, short, seeded):
    def silence(_pipe, _index, _timestep, tensors):
        tensors["prompt_embeds"].zero_()

    plain = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    arguments = {**short, "callback_on_step_end": silence, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert not torch.equal(own_pipe(CIRCLE, **arguments, generator=seeded(0)).images, plain)
    assert torch.equal(own_pipe(CIRCLE, **short, generator=seeded(0)).images, plain)


def offload_models(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_groups(pipe):
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_models, offload_groups])
def test_an_offloaded_text_encoder_reads_its_instruction_once(offload, own_pipe, short, seeded, lengths):
    plain = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    own_pipe.text_cache.clear()
    lengths.clear()
    offload(own_pipe)
    assert torch.equal(own_pipe(CIRCLE, **short, generator=seeded(0)).images, plain)
    own_pipe(ASTRONAUT, **short)
    assert torch.equal(own_pipe(CIRCLE, **short, generator=seeded(0)).images, plain)
    assert len(lengths) == 1 + 2
    own_pipe.remove_all_hooks()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_the_instruction_of_an_offloaded_text_encoder_waits_on_the_cpu(method, own_pipe, short, seeded, lengths):
    plain = own_pipe.to("cuda")(CIRCLE, **short, generator=seeded(0)).images
    own_pipe.to("cpu")
    getattr(own_pipe, method)()
    own_pipe.text_cache.clear()
    lengths.clear()
    own_pipe(ASTRONAUT, **short)
    offloaded = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    assert_close(offloaded, plain, **CLOSE)
    assert len(lengths) == 1 + 2
    # What stays on the GPU is of the prompts.
    own_pipe.text_cache.max_prompts = 0
    own_pipe.text_cache.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    own_pipe(CIRCLE, **short)
    assert torch.cuda.memory_allocated() - before < 10_000  # keys and values take 180 kB
