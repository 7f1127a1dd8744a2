"""Prompt encoding with a tiny Gemma-2 and a tiny Gemma tokenizer, beside the installed diffusers' on the same two."""

import json

import pytest
import torch
from diffusers import SanaSprintPipeline
from tokenizers.trainers import BpeTrainer
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from sana_sprint.text.encoder import check_embeds, check_prompt, drop_padding, encode_prompts, repeat_for_images
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
LENGTH = 12
ASTRONAUT = "a tiny astronaut hatching from an egg on the moon"
PROMPTS = {
    "short": ["A cat"],
    "empty": [""],
    "blank": ["  \n "],
    "too long": [" ".join(["word", "by", "word"] * 9)],
    "non-Latin": ["猫 и кот 🐈"],
    "several": ["Cat", ASTRONAUT, "", "  a red CIRCLE left of a blue square "],
}


@pytest.fixture(scope="module")
def tokenizer() -> GemmaTokenizer:
    """A GemmaTokenizer as published, but for its merges, learnt here from the instruction."""
    learner = GemmaTokenizer()._tokenizer
    learner.train_from_iterator(
        [*COMPLEX_HUMAN_INSTRUCTION, *map(str.lower, COMPLEX_HUMAN_INSTRUCTION)] * 3,
        BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    return GemmaTokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], add_bos_token=True)


@pytest.fixture(scope="module")
def text_encoder(tokenizer) -> Gemma2Model:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    return Gemma2Model(config).eval()


@pytest.fixture(scope="module")
def encode(tokenizer, text_encoder):
    """`encode_prompts` with the tiny components, on the CPU in float32."""

    def encode(prompts, **options):
        options = {"device": "cpu", "dtype": torch.float32, "max_sequence_length": LENGTH} | options
        with torch.no_grad():
            return encode_prompts(tokenizer, text_encoder, prompts, **options)

    return encode


@pytest.fixture(scope="module")
def upstream(tokenizer, text_encoder):
    """diffusers' `encode_prompt` with the same tiny components, its mark on the tokenizer removed."""
    pipeline = SanaSprintPipeline(tokenizer, text_encoder, None, None, None)

    def encode(prompts, **options):
        side = tokenizer.padding_side
        with torch.no_grad():
            encoded = pipeline.encode_prompt(prompts, device="cpu", **{"max_sequence_length": LENGTH} | options)
        tokenizer.padding_side = side
        return encoded

    return encode


@pytest.mark.parametrize("instruction", [None, [], COMPLEX_HUMAN_INSTRUCTION, ["Draw: "]])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_embeddings_and_mask_are_those_of_diffusers(prompts, instruction, encode, upstream):
    embeds, mask, _ = encode(prompts, instruction=instruction)
    their_embeds, their_mask = upstream(prompts, complex_human_instruction=instruction)
    assert embeds.shape == (len(prompts), LENGTH, 32)
    assert torch.equal(embeds, their_embeds)
    assert torch.equal(mask, their_mask)


@pytest.mark.parametrize("max_sequence_length", [1, 2, 7, 300])
def test_every_length_gives_the_embeddings_of_diffusers(max_sequence_length, encode, upstream):
    for instruction in (None, COMPLEX_HUMAN_INSTRUCTION):
        embeds, mask, _ = encode([ASTRONAUT], max_sequence_length=max_sequence_length, instruction=instruction)
        their_embeds, their_mask = upstream(
            [ASTRONAUT], max_sequence_length=max_sequence_length, complex_human_instruction=instruction
        )
        assert embeds.shape[1] == mask.shape[1] == max_sequence_length
        assert torch.equal(embeds, their_embeds)
        assert torch.equal(mask, their_mask)


def test_cleaned_captions_get_the_embeddings_of_diffusers(encode, upstream):
    caption = "<b>A Cat</b> &amp; https://example.org/cat"
    embeds, mask, _ = encode(caption, clean_caption=True)
    their_embeds, their_mask = upstream(caption, clean_caption=True)
    assert torch.equal(embeds, their_embeds)
    assert torch.equal(mask, their_mask)
    assert torch.equal(embeds, encode("a cat").embeds)


def test_one_string_a_list_and_a_tuple_are_encoded_alike(encode):
    assert torch.equal(encode("a cat").embeds, encode(["a cat"]).embeds)
    assert torch.equal(encode("a cat").embeds, encode(("a cat",)).embeds)


def test_a_prompt_does_not_see_the_others_of_its_batch(encode):
    together = encode(PROMPTS["several"], instruction=COMPLEX_HUMAN_INSTRUCTION)
    for position, prompt in enumerate(PROMPTS["several"]):
        alone = encode(prompt, instruction=COMPLEX_HUMAN_INSTRUCTION)
        assert torch.equal(together.mask[position], alone.mask[0])
        # float32 products of another batch size may be summed in another order; embeddings are of order 1.
        torch.testing.assert_close(together.embeds[position], alone.embeds[0], atol=1e-5, rtol=0)


def test_embeddings_come_in_the_dtype_asked_for(encode):
    half = encode("a cat", dtype=torch.bfloat16)
    assert half.embeds.dtype == torch.bfloat16
    assert torch.equal(half.embeds, encode("a cat").embeds.bfloat16())
    assert not half.mask.is_floating_point()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_is_left_as_it_was_and_its_side_does_not_matter(side, tokenizer, encode, monkeypatch):
    expected = encode("a cat", instruction=COMPLEX_HUMAN_INSTRUCTION)
    monkeypatch.setattr(tokenizer, "padding_side", side)
    encoded = encode("a cat", instruction=COMPLEX_HUMAN_INSTRUCTION)
    assert tokenizer.padding_side == side
    assert torch.equal(encoded.embeds, expected.embeds)
    assert torch.equal(encoded.mask, expected.mask)


# --- what is cut


@pytest.mark.parametrize("instruction", [None, COMPLEX_HUMAN_INSTRUCTION])
def test_what_is_cut_off_a_prompt_is_reported_and_makes_no_difference(instruction, encode):
    prompts = [ASTRONAUT, "cat", ASTRONAUT + " at night"]
    embeds, mask, cut = encode(prompts, instruction=instruction)
    assert mask.all(dim=1).tolist() == [True, False, True]
    assert cut[1] is None
    assert 1 < len(cut[0]) < len(ASTRONAUT)
    assert ASTRONAUT.endswith(cut[0])
    assert cut[2] == cut[0] + " at night"
    torch.testing.assert_close(embeds[0], embeds[2], atol=1e-6, rtol=0)  # the same tokens in two rows of one batch


def test_a_prompt_that_just_fits_is_not_reported_as_cut(tokenizer, encode):
    num_tokens = len(tokenizer.encode(ASTRONAUT))
    exact = encode(ASTRONAUT, max_sequence_length=num_tokens)
    assert exact.mask.all()
    assert exact.cut == (None,)
    last_token = tokenizer.decode(tokenizer.encode(ASTRONAUT)[-1:])
    assert encode(ASTRONAUT, max_sequence_length=num_tokens - 1).cut == (last_token,)


# --- repeating for images (upstream defect A1)


def test_images_of_one_prompt_get_its_own_embeddings_and_its_own_mask(encode):
    embeds, mask, _ = encode(["cat", ASTRONAUT], max_sequence_length=40)
    repeated_embeds, repeated_mask = repeat_for_images(embeds, mask, 2)
    assert torch.equal(repeated_embeds, embeds[[0, 0, 1, 1]])
    assert torch.equal(repeated_mask, mask[[0, 0, 1, 1]])
    assert mask[0].sum() < mask[1].sum()  # otherwise the order of the masks could not be seen


@pytest.mark.parametrize("number", [0, -1, None, 1.5, "2"])
def test_a_number_of_images_below_one_is_refused(number):
    with pytest.raises(ValueError, match="num_images_per_prompt must be a whole number from 1, got"):
        repeat_for_images(torch.zeros(1, 3, 4), torch.ones(1, 3), number)


# --- refusals


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"string or a non-empty list of strings, got \[\]"),
        ((), r"string or a non-empty list of strings, got \(\)"),
        (None, "string or a non-empty list of strings, got None"),
        (7, "string or a non-empty list of strings, got 7"),
        ({"a cat"}, "string or a non-empty list of strings, got {'a cat'}"),
        ([None], "strings only, got None at position 0"),
        (["a cat", 1], "strings only, got 1 at position 1"),
        ([["a cat"]], r"strings only, got \['a cat'\] at position 0"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt, message, encode):
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt)
    with pytest.raises(ValueError, match=message):
        encode(prompt)


def test_strings_lists_and_tuples_are_prompts():
    assert check_prompt("a") == check_prompt(["a"]) == check_prompt(("a",)) == ["a"]
    assert check_prompt("") == [""]


@pytest.mark.parametrize(
    ("embeds", "mask"),
    [((2, 3, 4), (2, 5)), ((2, 3, 4), (1, 3)), ((2, 3), (2, 3)), ((2, 3, 4), (2, 1, 3)), ((1, 2, 3, 4), (1, 2))],
)
def test_embeddings_and_mask_that_do_not_fit_are_refused(embeds, mask):
    for check in (check_embeds, lambda *pair: repeat_for_images(*pair, 1)):
        with pytest.raises(ValueError, match="same batch and length, got") as refusal:
            check(torch.zeros(embeds), torch.ones(mask))
        assert f"{embeds} and {mask}" in str(refusal.value)


def test_embeddings_without_a_mask_are_refused():
    with pytest.raises(ValueError, match="need their prompt_attention_mask, got None"):
        check_embeds(torch.zeros(1, 2, 3), None)


def test_a_length_below_one_is_refused(encode):
    with pytest.raises(ValueError, match="max_sequence_length must be at least 1, got 0"):
        encode("a cat", max_sequence_length=0)


def test_padding_is_dropped_where_every_row_has_it_and_a_mask_of_ones_altogether():
    embeds = torch.arange(2 * 5).view(2, 5, 1).float()
    ragged = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    kept, mask = drop_padding(embeds, ragged)
    assert torch.equal(kept, embeds[:, :3])
    assert torch.equal(mask, ragged[:, :3])
    kept, mask = drop_padding(embeds[:1], ragged[:1])
    assert torch.equal(kept, embeds[:1, :2])
    assert mask is None


def test_text_that_is_masked_altogether_keeps_its_mask():
    embeds, mask = torch.zeros(1, 3, 1), torch.zeros(1, 3)
    assert drop_padding(embeds, mask) == (embeds, mask)


@pytest.mark.parametrize(("length", "padded"), [(1, 4), (4, 4), (5, 6), (6, 6), (7, 7)])
def test_what_is_left_of_a_text_is_padded_to_the_first_length_that_it_fits_into(length, padded):
    embeds = torch.ones(2, 9, 3)
    mask = (torch.arange(9) < torch.tensor([[1], [length]])).long()
    kept, its_mask = drop_padding(embeds, mask, lengths=(4, 6))
    assert kept.shape == (2, padded, 3)
    assert torch.equal(kept[:, :length], embeds[:, :length])
    assert its_mask.sum(dim=1).tolist() == [1, length]
    assert its_mask.shape == (2, padded)
