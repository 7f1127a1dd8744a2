"""Prompts read behind a kept instruction, beside the same prompts read whole, with a tiny Gemma-2 and tokenizer."""

import gc
import weakref
from copy import deepcopy
from itertools import product

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, Gemma2Config, Gemma2Model, GemmaTokenizer
from wide_text import wide_text_encoder

from sana_sprint.text.cache import MAX_PREFIXES, Reading, TextCache, fingerprint
from sana_sprint.text.encoder import encode_prompts
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.text.prefix import read_behind

LENGTH = 12
ASTRONAUT = "a tiny astronaut hatching from an egg on the moon"
CIRCLE = "a red circle"
PROMPTS = {
    "one": [CIRCLE],
    "empty": [""],
    "too long": [" ".join([ASTRONAUT] * 4)],
    "non-Latin": ["猫 и кот 🐈"],
    "of several lengths": [CIRCLE, ASTRONAUT, "", "  a blue SQUARE "],
    "alike": [CIRCLE] * 3,
}
INSTRUCTIONS = {
    "none": None,
    "of no lines": [],
    "SANA's": COMPLEX_HUMAN_INSTRUCTION,
    "short": ["Draw: "],
    "part of a word": ["a tiny astronaut on a t"],
    "part of a word after a long one": [*COMPLEX_HUMAN_INSTRUCTION, "three yellow tri"],
}
# Embeddings are of order 1 and in float32; matrix products of other sizes sum in another order.
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def encoder(tiny_text_encoder) -> Gemma2Model:
    """One to be altered."""
    return deepcopy(tiny_text_encoder)


@pytest.fixture
def cache() -> TextCache:
    return TextCache()


@pytest.fixture
def read(tiny_tokenizer):
    """`encode_prompts` on the CPU behind SANA's instruction, without gradients."""

    @torch.no_grad()
    def read(encoder, prompts, cache=None, *, tokenizer=tiny_tokenizer, **options):
        options = {
            "device": "cpu",
            "dtype": torch.float32,
            "max_sequence_length": LENGTH,
            "instruction": COMPLEX_HUMAN_INSTRUCTION,
        } | options
        return encode_prompts(tokenizer, encoder, prompts, cache=cache, **options)

    return read


@pytest.fixture
def counted(encoder):
    """The numbers of tokens that the encoder has read, texts times length, one for each time that it ran."""
    counts: list[int] = []
    encoder.embed_tokens.register_forward_pre_hook(lambda _, given: counts.append(given[0].numel()))
    return counts


def assert_alike(kept, whole, **close):
    """The same text, and nothing where there is none."""
    assert torch.equal(kept.mask, whole.mask)
    assert kept.cut == whole.cut
    assert kept.embeds.shape == whole.embeds.shape
    assert kept.embeds.dtype == whole.embeds.dtype
    is_text = whole.mask > 0
    assert_close(kept.embeds[is_text], whole.embeds[is_text], **(close or CLOSE))
    assert not kept.embeds[~is_text].any()


# --- the same embeddings


@pytest.mark.parametrize("instruction", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_prompts_behind_a_kept_instruction_are_those_read_whole(prompts, instruction, tiny_text_encoder, cache, read):
    whole = read(tiny_text_encoder, prompts, instruction=instruction)
    for _ in range(2):
        assert_alike(read(tiny_text_encoder, prompts, cache, instruction=instruction), whole)


@pytest.mark.parametrize("instruction", [None, COMPLEX_HUMAN_INSTRUCTION])
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_every_length_keeps_the_same_tokens(length, instruction, tiny_text_encoder, cache, read):
    for prompts in ([ASTRONAUT], [ASTRONAUT, ""], [" ".join([ASTRONAUT] * 30)]):
        whole = read(tiny_text_encoder, prompts, instruction=instruction, max_sequence_length=length)
        kept = read(tiny_text_encoder, prompts, cache, instruction=instruction, max_sequence_length=length)
        assert_alike(kept, whole)


def test_an_instruction_serves_any_number_of_prompts_and_stays_as_it_was(tiny_text_encoder, cache, read):
    first = read(tiny_text_encoder, CIRCLE, cache).embeds
    for prompts in PROMPTS.values():
        read(tiny_text_encoder, prompts, cache)
    cache_without_prompts = TextCache(max_prompts=0)
    for _ in range(3):
        assert torch.equal(read(tiny_text_encoder, CIRCLE, cache_without_prompts).embeds, first)


def test_an_instruction_longer_than_the_sliding_window_is_read_alike(tiny_text_encoder, cache, read):
    encoder = Gemma2Model(Gemma2Config(**tiny_text_encoder.config.to_dict() | {"sliding_window": 8})).eval()
    encoder.load_state_dict(tiny_text_encoder.state_dict())
    for prompts in ([CIRCLE], PROMPTS["of several lengths"]):
        whole = read(encoder, prompts, max_sequence_length=40)
        assert_alike(read(encoder, prompts, cache, max_sequence_length=40), whole)
    assert not torch.equal(whole.embeds, read(tiny_text_encoder, prompts, max_sequence_length=40).embeds)


@pytest.fixture(scope="module")
def wide_encoder(tiny_tokenizer, tmp_path_factory) -> tuple[Gemma2Model, str]:
    """One of a width that can be quantised, and its folder."""
    encoder = wide_text_encoder(len(tiny_tokenizer))
    folder = str(tmp_path_factory.mktemp("wide") / "text_encoder")
    encoder.save_pretrained(folder)
    return encoder, folder


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    ("settings", "is_exact"),
    [
        pytest.param({"load_in_8bit": True, "llm_int8_threshold": 0.0}, True, id="8 bits"),
        pytest.param({"load_in_8bit": True}, False, id="8 bits with outliers"),
        pytest.param({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, True, id="4 bits"),
    ],
)
def test_a_quantised_encoder_reads_alike(settings, is_exact, prompts, wide_encoder, cache, read):
    exact_encoder, folder = wide_encoder
    config = BitsAndBytesConfig(**settings)
    encoder = Gemma2Model.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    whole = read(encoder, prompts)
    # Columns with outliers are multiplied in 16 bits, those of the instruction only where it is read along. That
    # makes less of a difference than quantisation does.
    error = (whole.embeds - read(exact_encoder, prompts).embeds)[whole.mask > 0].abs().max()
    for _ in range(2):
        assert_alike(read(encoder, prompts, cache), whole, atol=1e-5 if is_exact else float(error), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_when_read_whole(dtype, encoder, cache, read):
    exact = read(encoder, ASTRONAUT, max_sequence_length=20)
    encoder.to(dtype)
    errors = [
        (read(encoder, ASTRONAUT, kept, max_sequence_length=20).embeds - exact.embeds)[exact.mask > 0].norm()
        for kept in (cache, None)
    ]
    assert errors[0] < 1.5 * errors[1]  # two sets of random roundings


def offloaded(encoder):
    cpu_offload(encoder, execution_device=torch.device("cpu"))


def mapped(encoder):
    dispatch_model(encoder, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("send_away", [offloaded, mapped])
def test_an_offloaded_or_mapped_encoder_reads_its_instruction_once(send_away, encoder, counted, cache, read):
    whole = read(encoder, ASTRONAUT)
    send_away(encoder)
    counted.clear()
    for prompt in (ASTRONAUT, CIRCLE, "a blue square"):
        read(encoder, prompt, cache)
    assert_alike(read(encoder, ASTRONAUT, cache), whole)
    assert len(counted) == 1 + 3


# --- what is read


def test_the_second_call_reads_the_tokens_of_its_prompt_only(tiny_tokenizer, encoder, counted, cache, read):
    prefix = "\n".join(COMPLEX_HUMAN_INSTRUCTION)
    in_instruction = len(tiny_tokenizer.encode(prefix))
    in_astronaut = len(tiny_tokenizer.encode(prefix + ASTRONAUT)) - (in_instruction - 1)
    in_circle = len(tiny_tokenizer.encode(prefix + CIRCLE)) - (in_instruction - 1)
    read(encoder, CIRCLE, cache, max_sequence_length=300)
    assert counted == [in_instruction - 1, in_circle]
    read(encoder, ASTRONAUT, cache, max_sequence_length=300)
    read(encoder, [CIRCLE, ASTRONAUT], cache, max_sequence_length=300)
    assert counted[2:] == [in_astronaut, 2 * in_astronaut]


def test_prompts_that_were_read_before_are_not_read_again(encoder, counted, cache, read):
    first = read(encoder, [CIRCLE, ASTRONAUT], cache)
    counted.clear()
    assert torch.equal(read(encoder, [CIRCLE, ASTRONAUT], cache).embeds, first.embeds)
    # In lower case and without spaces around they are the same; the width of the padding makes no difference.
    longer = read(encoder, [CIRCLE.upper() + " ", ASTRONAUT], cache, dtype=torch.bfloat16)
    assert torch.equal(longer.embeds, first.embeds.bfloat16())
    assert not counted
    read(encoder, [ASTRONAUT, CIRCLE], cache)
    assert counted


def test_the_prompts_kept_are_the_last_ones(encoder, counted, read):
    cache = TextCache(max_prompts=2)
    for prompt in ("one", "two", "one", "three"):
        read(encoder, prompt, cache)
    counted.clear()
    read(encoder, "one", cache)
    read(encoder, "three", cache)
    assert not counted
    read(encoder, "two", cache)
    assert len(counted) == 1


def test_no_prompts_are_kept_where_none_are_wanted(encoder, counted, read):
    cache = TextCache(max_prompts=0)
    for _ in range(3):
        read(encoder, CIRCLE, cache)
    assert len(counted) == 1 + 3


def test_the_instructions_kept_are_the_last_ones(encoder, counted, cache, read):
    instructions = [[f"{number}: "] for number in range(MAX_PREFIXES + 1)]
    for instruction in [*instructions, *instructions[1:]]:
        read(encoder, f"{CIRCLE} {len(counted)}", cache, instruction=instruction)
    assert len(counted) == 2 * (MAX_PREFIXES + 1) + MAX_PREFIXES
    read(encoder, ASTRONAUT, cache, instruction=instructions[0])
    assert len(counted) == 2 * (MAX_PREFIXES + 1) + MAX_PREFIXES + 2


def test_nothing_is_read_after_clearing_but_everything(encoder, counted, cache, read):
    read(encoder, CIRCLE, cache)
    read_at_first = list(counted)
    cache.clear()
    read(encoder, CIRCLE, cache)
    assert counted == read_at_first * 2


# --- what makes it read again


def edited(encoder):
    with torch.no_grad():
        encoder.layers[1].self_attn.v_proj.weight[3, 5] += 1


def edited_behind_torchs_back(encoder):
    encoder.layers[0].mlp.up_proj.weight.data.add_(0.1)


def loaded(encoder):
    state = {name: weight * 1.25 for name, weight in encoder.state_dict().items()}
    encoder.load_state_dict(state)


def cast(encoder):
    encoder.to(torch.bfloat16)


def cast_to_and_fro(encoder):
    encoder.to(torch.bfloat16).to(torch.float32)


def exchanged_in_part(encoder):
    torch.manual_seed(5)
    encoder.layers[0] = type(encoder.layers[0])(encoder.config, 0).eval()
    torch.nn.init.normal_(encoder.layers[0].self_attn.v_proj.weight)


def shortened(encoder):
    encoder.layers = encoder.layers[:1]
    encoder.config.num_hidden_layers = 1


def steered(encoder):
    encoder.layers[0].register_forward_hook(lambda _, __, states: states * 1.5)


def merged_with_adapters(encoder):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert get_peft_model(encoder, adapters).merge_and_unload() is encoder


@pytest.mark.parametrize(
    "change",
    [
        edited,
        edited_behind_torchs_back,
        loaded,
        cast,
        cast_to_and_fro,
        exchanged_in_part,
        shortened,
        steered,
        merged_with_adapters,
    ],
)
def test_an_encoder_that_has_changed_reads_everything_again(change, encoder, counted, cache, read):
    before = read(encoder, ASTRONAUT, cache)
    change(encoder)
    whole = read(encoder, ASTRONAUT)
    assert (whole.embeds - before.embeds)[0, 1:].abs().max() > 1e-3
    counted.clear()
    close = {"atol": 0.1, "rtol": 0} if change is cast else CLOSE  # of order 1, in 8 bits
    assert_alike(read(encoder, ASTRONAUT, cache), whole, **close)
    assert len(counted) == 2  # the instruction and the prompt


def test_nothing_has_changed_where_nothing_was_done(encoder, cache, read):
    before = fingerprint(encoder)
    read(encoder, ASTRONAUT, cache)
    assert fingerprint(encoder) == before
    encoder.set_attn_implementation("flex_attention")
    assert fingerprint(encoder) != before


def test_another_tokenizer_instruction_or_encoder_is_not_confused_with_the_first(
    tiny_tokenizer, tiny_text_encoder, encoder, cache, read
):
    letters = GemmaTokenizer(vocab=tiny_tokenizer.get_vocab(), merges=[], add_bos_token=True)
    edited(encoder)
    asked = list(
        product([tiny_text_encoder, encoder], [tiny_tokenizer, letters], [COMPLEX_HUMAN_INSTRUCTION, ["Draw: "], None])
    )
    for model, tokenizer, instruction in asked * 2:
        whole = read(model, CIRCLE, tokenizer=tokenizer, instruction=instruction)
        assert_alike(read(model, CIRCLE, cache, tokenizer=tokenizer, instruction=instruction), whole)


def test_autocast_is_not_confused_with_full_precision(encoder, cache, read):
    exact = read(encoder, ASTRONAUT, cache)
    with torch.autocast("cpu", torch.bfloat16):
        whole, kept = read(encoder, ASTRONAUT), read(encoder, ASTRONAUT, cache)
        assert_alike(kept, whole, atol=0.1, rtol=0)  # of order 1, in 8 bits
    assert not torch.equal(kept.embeds, exact.embeds)
    assert torch.equal(read(encoder, ASTRONAUT, cache).embeds, exact.embeds)


class Doubled(torch.Tensor):
    """A weight that is kept as its half, wrapped as quantised weights of torchao are."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half = half

    def __tensor_flatten__(self):
        return ["half"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].half)
        if function is torch.ops.aten.as_strided.default:
            raise NotImplementedError  # as of most functions that no network calls
        plain = [given.half * 2 if isinstance(given, cls) else given for given in args]
        return function(*plain, **(kwargs or {}))


def test_a_change_within_a_wrapped_weight_is_noticed(encoder, counted, cache, read):
    layer = encoder.layers[0].self_attn.v_proj
    layer.weight = torch.nn.Parameter(Doubled(layer.weight.detach() / 2), requires_grad=False)
    for _ in range(2):
        assert_alike(read(encoder, ASTRONAUT, cache), read(encoder, ASTRONAUT))
    with torch.no_grad():
        layer.weight.half *= 3
    assert_alike(read(encoder, ASTRONAUT, cache), read(encoder, ASTRONAUT))


# --- what is never kept


def test_the_scale_of_adapters_has_its_effect_in_every_call(encoder, cache, read):
    from diffusers.utils import scale_lora_layers
    from peft import LoraConfig, inject_adapter_in_model

    plain = read(encoder, ASTRONAUT, cache)
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), encoder)
    full = read(encoder, ASTRONAUT, cache)
    assert not torch.equal(full.embeds, plain.embeds)
    scale_lora_layers(encoder, 0.5)
    half = read(encoder, ASTRONAUT, cache)
    assert_alike(half, read(encoder, ASTRONAUT))
    assert not torch.equal(half.embeds, full.embeds)


def test_gradients_are_those_of_prompts_read_whole(tiny_tokenizer, encoder, cache):
    def gradient(cache):
        embeds, mask, _ = encode_prompts(
            tiny_tokenizer,
            encoder,
            PROMPTS["of several lengths"],
            device="cpu",
            dtype=torch.float32,
            max_sequence_length=LENGTH,
            instruction=["Draw: "],
            cache=cache,
        )
        encoder.zero_grad()
        embeds[mask > 0].pow(3).mean().backward()
        return encoder.layers[0].self_attn.v_proj.weight.grad.clone()

    whole = gradient(None)
    for _ in range(2):  # twice, for a graph that was kept could be walked only once
        assert_close(gradient(cache), whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


def test_embeddings_are_the_same_bit_for_bit_with_gradients_and_without(tiny_tokenizer, encoder, cache, read):
    options = {"device": "cpu", "dtype": torch.float32, "max_sequence_length": LENGTH, "cache": cache}
    with_gradients = encode_prompts(tiny_tokenizer, encoder, CIRCLE, instruction=COMPLEX_HUMAN_INSTRUCTION, **options)
    assert with_gradients.embeds.requires_grad
    assert torch.equal(with_gradients.embeds, read(encoder, CIRCLE, cache).embeds)


def test_an_encoder_in_training_reads_everything_each_time(encoder, counted, cache, read):
    encoder.train().config.attention_dropout = 0.5
    for layer in encoder.layers:
        layer.self_attn.attention_dropout = 0.5
    assert not torch.equal(read(encoder, CIRCLE, cache).embeds, read(encoder, CIRCLE, cache).embeds)
    assert len(counted) == 2


# --- the life of what is kept


def test_embeddings_may_be_edited_without_altering_what_is_kept(encoder, cache, read):
    for prompt in (CIRCLE, " ".join([ASTRONAUT] * 4)):  # with padding and without
        given = read(encoder, prompt, cache).embeds
        before = given.clone()
        given.zero_()
        assert torch.equal(read(encoder, prompt, cache).embeds, before)


def test_what_was_kept_in_inference_mode_serves_outside_of_it(encoder, cache, read):
    with torch.inference_mode():
        read(encoder, CIRCLE, cache)
    for prompt in (CIRCLE, ASTRONAUT):
        assert_alike(read(encoder, prompt, cache), read(encoder, prompt))
        read(encoder, prompt, cache).embeds.mul_(2).requires_grad_()  # refused for tensors of inference mode


@torch.no_grad()
def test_what_is_kept_goes_with_the_weights_and_with_the_encoder(tiny_text_encoder, cache, read):
    encoder = deepcopy(tiny_text_encoder)
    read(encoder, CIRCLE, cache)
    first = weakref.ref(cache.kept(encoder, torch.device("cpu")))
    assert first() is not None
    edited(encoder)
    second = weakref.ref(cache.kept(encoder, torch.device("cpu")))
    assert first() is None
    assert second() is not None
    del encoder
    gc.collect()
    assert second() is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("prompts", "lengths", "found"),
    [([""], (2, 40), 2), ([""], (40,), LENGTH - 1), ([CIRCLE, ASTRONAUT], (2, 40), LENGTH - 1)],
    ids=["padded", "padded to the end of the row", "several"],
)
def test_texts_padded_to_a_length_are_read_alike(prompts, lengths, found, tiny_text_encoder, cache, read):
    read_lengths = []

    def recorded(text_encoder, prefix, ids, mask):
        read_lengths.append(ids.shape[1])
        return read_behind(text_encoder, prefix, ids, mask)

    cache.reading = Reading(recorded, lengths)
    assert_alike(read(tiny_text_encoder, prompts, cache), read(tiny_text_encoder, prompts))
    assert read_lengths == [found]


def test_a_copy_of_a_cache_is_empty(encoder, counted, cache, read):
    cache.max_prompts = 3
    read(encoder, CIRCLE, cache)
    copied = deepcopy(cache)
    assert copied.max_prompts == 3
    counted.clear()
    read(encoder, CIRCLE, copied)
    assert len(counted) == 2
