"""The tables of names: one row for every tensor, and the same row in either direction."""

import re

import pytest
import torch

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.rules import (
    AUTOENCODER_SHUFFLED,
    AUTOENCODER_STRIDED,
    CONTROLNET,
    CONTROLNET_OF_LATENTS,
    LAYOUTS,
    TRANSFORMER,
    Table,
    table_of,
)
from sana_sprint.transformer.model import SanaTransformer2DModel

SPRINT = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True, "num_layers": 12}
ALL_TABLES = {
    "transformer": TRANSFORMER,
    "controlnet": CONTROLNET,
    "controlnet_of_latents": CONTROLNET_OF_LATENTS,
    "autoencoder_strided": AUTOENCODER_STRIDED,
    "autoencoder_shuffled": AUTOENCODER_SHUFFLED,
}


def names_of(model_class: type, **config) -> list[str]:
    with torch.device("meta"):
        return list(model_class(**config).state_dict())


def example(pattern: str) -> str:
    """A name that a row's pattern stands for."""
    values = {"i": "3", "j": "10", "k": "0", "p": "bias", "s": "running_mean"}
    return re.sub(r"\{(\w)\}", lambda mark: values[mark[1]], pattern)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (TRANSFORMER, names_of(SanaTransformer2DModel)),
        (TRANSFORMER, names_of(SanaTransformer2DModel, **SPRINT)),
        (AUTOENCODER_SHUFFLED, names_of(AutoencoderDC, decoder_norm_types="batch_norm")),
        (AUTOENCODER_STRIDED, names_of(AutoencoderDC, downsample_block_type="Conv")),
        (AUTOENCODER_SHUFFLED, names_of(AutoencoderDC, encoder_block_types="EfficientViTBlock")),
        (AUTOENCODER_SHUFFLED, names_of(AutoencoderDC, encoder_layers_per_block=(0, 1, 1, 1, 1, 1))),
        (AUTOENCODER_SHUFFLED, names_of(AutoencoderDC, decoder_layers_per_block=(0, 1, 1, 1, 1, 1))),
    ],
    ids=["plain", "sprint", "batch_norm", "strided", "attention", "half_resolution_stem", "half_resolution_head"],
)
def test_every_tensor_of_our_models_has_one_row_that_leads_back_to_it(table, names):
    for name in names:
        matching = [
            rule
            for rule in table.rules
            for pattern in rule.diffusers
            if Table((rule,)).names("diffusers").fullmatch(name)
        ]
        assert len({id(rule) for rule in matching}) == 1, name
        place = table.original_of(name)
        assert place is not None
        # The time embedder's two spellings share an original name; which one it becomes, the config decides.
        assert table.diffusers_of(place.name)[place.part].replace(".emb.", ".") == name.replace(".emb.", ".")


@pytest.mark.parametrize("name", sorted(ALL_TABLES))
def test_no_row_repeats_another(name):
    rules = ALL_TABLES[name].rules
    targets = [pattern for rule in rules for pattern in rule.diffusers]
    assert len(set(targets)) == len(targets)
    sources = [rule.original for rule in rules if not rule.original.startswith("t_embedder")]
    assert len(set(sources)) == len(sources)


@pytest.mark.parametrize("name", sorted(ALL_TABLES))
def test_both_sides_of_a_row_have_the_same_marks(name):
    for rule in ALL_TABLES[name].rules:
        for pattern in rule.diffusers:
            # "controlnet.0.before_proj" is the one place where a number is part of a name.
            assert re.findall(r"\{\w\}", pattern) == re.findall(r"\{\w\}", rule.original)


@pytest.mark.parametrize("name", sorted(ALL_TABLES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_expression_of_a_layout_knows_every_row_and_nothing_around_it(name, layout):
    table = ALL_TABLES[name]
    for rule in table.rules:
        for pattern in (rule.original,) if layout == "original" else rule.diffusers:
            known = example(pattern)
            assert table.names(layout).fullmatch(known), known
            assert not table.names(layout).fullmatch("x" + known)
            assert not table.names(layout).fullmatch(known + "x")
            assert not table.names(layout).fullmatch(known + ".weight")


def test_the_thirds_of_qkv_and_the_halves_of_kv_come_in_order():
    block = "transformer_blocks.4"
    assert TRANSFORMER.diffusers_of("blocks.4.attn.qkv.weight") == tuple(
        f"{block}.attn1.to_{letter}.weight" for letter in "qkv"
    )
    assert TRANSFORMER.diffusers_of("blocks.4.cross_attn.kv_linear.bias") == tuple(
        f"{block}.attn2.to_{letter}.bias" for letter in "kv"
    )
    place = TRANSFORMER.original_of(f"{block}.attn2.to_v.weight")
    assert place is not None
    assert (place.name, place.part, place.count) == ("blocks.4.cross_attn.kv_linear.weight", 1, 2)


@pytest.mark.parametrize(
    "name", ["blocks.04.attn.proj.bias", "blocks.-1.attn.proj.bias", "blocks.12345.attn.proj.bias"]
)
def test_a_number_that_no_block_has_is_not_known(name):
    assert TRANSFORMER.diffusers_of("blocks.4.attn.proj.bias")
    assert TRANSFORMER.diffusers_of(name) == ()


def test_positions_are_dropped_under_every_wrapper_that_training_gives_them():
    assert all(TRANSFORMER.is_dropped(name) for name in ("pos_embed", "base_model.pos_embed", "model.pos_embed"))
    assert not TRANSFORMER.is_dropped("blocks.0.pos_embed")
    assert not AUTOENCODER_STRIDED.is_dropped("pos_embed")


def test_a_1x1_convolution_becomes_a_matrix_only_where_the_autoencoder_multiplies_with_one():
    pointwise = {rule.original.rpartition("}.")[2] for rule in AUTOENCODER_STRIDED.rules if rule.pointwise}
    assert pointwise == {"context_module.main.qkv.conv.weight", "context_module.main.proj.conv.weight"}
    assert not any(rule.pointwise for rule in (*TRANSFORMER.rules, *CONTROLNET.rules))


def test_an_encoder_that_unshuffles_has_one_more_convolution_in_its_names():
    name = "encoder.down_blocks.0.2.conv.bias"
    for kind, infix in (("pixel_unshuffle", "conv.conv"), ("Conv", "conv")):
        place = table_of("autoencoder", {"downsample_block_type": kind}).original_of(name)
        assert place is not None
        assert place.name == f"encoder.stages.0.op_list.2.main.{infix}.bias"
