"""Maps of a pipeline's networks: what they may say, what is refused before anything loads, and networks apart."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from sana_sprint import SanaSprintPipeline

NETWORKS = ("text_encoder", "transformer", "vae")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

MAPS = [
    {"": "cpu"},
    {"transformer": "cpu"},
    {"text_encoder": "cpu", "transformer": torch.device("cpu"), "vae": "cpu:0"},
    {"vae": "cpu", "": "cpu"},
    {},
]


@pytest.mark.parametrize("device_map", MAPS, ids=str)
def test_a_map_by_network_draws_what_is_drawn_without_it(load_wide, draw, device_map):
    before = dict(device_map)
    pipe = load_wide(device_map=device_map)
    assert device_map == before
    assert pipe.hf_device_map.keys() == set(NETWORKS)
    assert torch.equal(draw(pipe), draw(load_wide()))


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "balanced", "max_memory": {"cpu": "1GB"}}])
@needs_none
def test_maps_that_are_names_draw_the_same(load_wide, draw, options):
    assert torch.equal(draw(load_wide(**options)), draw(load_wide()))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_map_takes_networks_of_8_and_4_bits(load_wide, draw, bits):
    expected = draw(load_wide(bits, device_map="cpu"))
    assert torch.equal(draw(load_wide(bits, device_map={"": "cpu"})), expected)


def test_networks_that_are_handed_in_are_placed_too_and_may_be_missing(load_wide, draw):
    other = load_wide()
    pipe = load_wide(transformer=other.transformer, text_encoder=None, tokenizer=None, device_map={"": "cpu"})
    assert pipe.transformer is other.transformer
    assert pipe.transformer.device.type == "cpu"
    embeds, mask = other.encode_prompt("a red circle", max_sequence_length=16)
    assert torch.equal(draw(pipe, prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask), draw(other))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"unet": "cpu"}, r"may name 'text_encoder', 'transformer', 'vae' and '' for the rest, got 'unet'$"),
        ({"unet": "cpu", "vae": "cpu", "tokenizer": 0}, r"got 'unet', 'tokenizer'$"),
        ({"transformer.proj_out": "cpu"}, "got 'transformer.proj_out'"),
        ({"vae": "warp"}, "device_map puts 'vae' on 'warp', which is not there: "),
        ({"vae": "disk"}, "device_map puts 'vae' on 'disk', which is not there: "),
        ({"": "cuda:99"}, "device_map puts 'the rest' on 'cuda:99', which is not there: "),
        ({"transformer": 99}, "device_map puts 'transformer' on 99, which is not there: "),
        ({"transformer": None}, "device_map puts 'transformer' on None, which is not there: "),
        ({"vae": "meta"}, "device_map puts 'vae' on 'meta', where nothing can be computed"),
    ],
)
def test_a_map_that_cannot_be_is_refused_in_one_line_before_anything_is_looked_for(device_map, message):
    with pytest.raises(ValueError, match=message) as refusal:
        SanaSprintPipeline.from_pretrained("no/where", device_map=device_map)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=str)
def test_max_memory_is_refused_where_nothing_is_balanced(device_map):
    with pytest.raises(ValueError, match="max_memory is for device_map='balanced', got it with device_map="):
        SanaSprintPipeline.from_pretrained("no/where", device_map=device_map, max_memory={0: "1GB"})


def test_a_mapped_pipeline_is_moved_and_offloaded_once_its_map_is_reset(load_wide, draw):
    pipe = load_wide(device_map={"": "cpu"})
    expected = draw(pipe)
    with pytest.raises(ValueError, match="reset_device_map"):
        pipe.to("cpu")
    for offload in (
        lambda: pipe.enable_model_cpu_offload(device="cpu"),
        lambda: pipe.enable_sequential_cpu_offload(device="cuda"),
        lambda: pipe.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1),
    ):
        with pytest.raises(ValueError, match="call reset_device_map"):
            offload()
    assert torch.equal(draw(pipe), expected)
    pipe.reset_device_map()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipe), expected)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("places", list(product(("cpu", "cuda"), repeat=3)), ids=str)
def test_networks_on_two_devices_hand_over_to_each_other(load_wide, draw, places):
    pipe = load_wide(device_map=dict(zip(NETWORKS, places)))
    assert tuple(getattr(pipe, name).device.type for name in NETWORKS) == places
    expected = draw(load_wide())
    # bfloat16 on two devices: sums in another order, some dozens of layers.
    assert (draw(pipe) - expected).abs().mean() < 0.02
    embeds, mask = pipe.encode_prompt("a red circle", max_sequence_length=16)
    assert embeds.device.type == mask.device.type == places[1]
    given = {"prompt": None, "prompt_embeds": embeds.cpu(), "prompt_attention_mask": mask.cpu()}
    assert_close(draw(pipe, **given), draw(pipe), atol=0.02, rtol=0)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_networks_go_where_the_map_says(load_wide, draw, bits):
    expected = draw(load_wide(bits, device_map={"": "cuda"}))
    for places in ({"text_encoder": "cpu", "": "cuda"}, {"transformer": "cpu", "": "cuda:0"}, {"transformer": 0}):
        pipe = load_wide(bits, device_map=places)
        assert (draw(pipe) - expected).abs().mean() < 0.03  # as above


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_networks_that_load_to_the_gpu_hand_over_to_those_that_do_not(load_wide, draw, bits):
    pipe = load_wide(bits)
    assert [getattr(pipe, name).device.type for name in NETWORKS] == ["cuda", "cuda", "cpu"]
    expected = draw(load_wide(bits).to("cuda"))
    assert (draw(pipe) - expected).abs().mean() < 0.02
