"""Pairs of pipelines: the same weights in the same memory, of a scale that keeps signals in range."""

import diffusers.models.transformers.sana_transformer as their_transformer
import pytest
import torch

import sana_sprint
from sana_sprint.bench.twins import MODELS, QUICK, configs_of
from sana_sprint.memory.configs import PUBLISHED
from sana_sprint.memory.stages import Workload

ALL = ("text_encoder", "transformer", "vae")


def test_weights_of_both_sides_are_the_same_memory(make_twins):
    pair = make_twins().pair(ALL)
    for name in ALL:
        ours, theirs = (dict(getattr(pipe, name).named_parameters()) for pipe in pair)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in ours)


def test_the_classes_of_a_pair_are_ours_and_diffusers_even_when_ours_are_registered(make_twins):
    sana_sprint.register()
    try:
        pair = make_twins().pair(["transformer"])
    finally:
        sana_sprint.unregister()
    assert type(pair.ours.transformer) is sana_sprint.SanaTransformer2DModel
    assert type(pair.theirs.transformer) is their_transformer.SanaTransformer2DModel
    assert type(pair.theirs).__module__.startswith("diffusers.")


def test_weights_depend_on_the_seed_and_nothing_else(make_twins):
    first, again, other = (
        make_twins(seed=seed).pair(["transformer"]).ours.transformer.patch_embed.proj.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_signals_stay_at_unit_scale_in_every_dtype(make_twins, case, dtype):
    size = Workload(height=64, width=64, dtype=dtype)
    for name in ("text, new prompt", "step", "decode"):
        chosen = case(name)
        pair = make_twins(dtype=dtype).pair(chosen.networks)
        runs = chosen.build(pair, size, 0)
        result = runs.ours(0)
        values = (result[0][:, 1:16] if chosen.group == "text" else result).float()
        # A tenth and ten times: half of float16's digits are left on either side.
        assert 0.1 < values.std() < 10, name


def test_networks_of_the_next_pair_are_kept_and_others_given_up(make_twins):
    twins = make_twins()
    first = twins.pair(["transformer", "vae"])
    second = twins.pair(["vae", "text_encoder"])
    assert second.ours.vae is first.ours.vae
    assert second.theirs.vae is first.theirs.vae
    assert second.ours.transformer is None
    assert twins.pair(["transformer"]).ours.transformer is not first.ours.transformer


def test_buffers_are_real_although_weights_were_made_on_the_meta_device(make_twins):
    encoder = make_twins().pair(["text_encoder"]).ours.text_encoder
    buffers = dict(encoder.named_buffers())
    assert buffers
    assert all(buffer.device.type == "cpu" and buffer.isfinite().all() for buffer in buffers.values())
    # The slowest angle of a rotary embedding turns once in 2 pi 10000^(30/32) tokens.
    frequencies = next(value for name, value in buffers.items() if name.endswith("inv_freq"))
    torch.testing.assert_close(frequencies[-1].item(), 10000 ** (-30 / 32))


def test_transformers_and_decoders_are_compiled_on_both_sides_and_nothing_else(make_twins):
    for pipe in make_twins(compiles=True).pair(ALL):
        networks = {name: getattr(pipe, name) for name in ALL} | {"decoder": pipe.vae.decoder}
        compiled = {name for name, network in networks.items() if network._compiled_call_impl is not None}
        assert compiled == {"transformer", "decoder"}


def test_models_are_the_published_ones_and_quick_is_a_small_one_of_their_kind():
    assert set(MODELS.values()) == set(PUBLISHED)
    assert configs_of("0.6b").transformer["num_layers"] == 28
    quick, published = configs_of(QUICK).transformer, configs_of("1.6b").transformer
    assert {name: quick[name] for name in ("guidance_embeds", "qk_norm")} == {
        name: published[name] for name in ("guidance_embeds", "qk_norm")
    }
    assert configs_of(QUICK).picture_size == 256
