"""Offloading, float8 storage and casts: the same picture as without, of 8 and 4 bits too, or an error."""

import gc
import weakref
from contextlib import nullcontext

import diffusers.models.autoencoders.autoencoder_dc as their_autoencoder
import pytest
import torch
from accelerate import cpu_offload
from bitsandbytes.nn import Linear8bitLt
from torch.testing import assert_close

from sana_sprint import SanaSprintPipeline, load_prompt_embeds, save_prompt_embeds
from sana_sprint.pipelines.scales import bring_scales

NETWORKS = ("text_encoder", "transformer", "vae")
CPU = torch.device("cpu")

cuda = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# Quantising loads to the GPU where there is one, and diffusers then leaves the other networks where they are.
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to quantise on")

# Of pictures in [0, 1], drawn in bfloat16 twice by the same kernels. A GPU's library may choose another convolution
# where it finds more memory; a weight that was not there in time gives another picture or none.
SAME_ON_GPU = {"atol": 0.02, "rtol": 0}


@pytest.fixture
def forgetful():
    """Memory that is not written to holds NaN, so that weights that were not fetched cannot be right by chance."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def offload_in_groups(pipe, **options) -> None:
    pipe.enable_group_offload(**{"onload_device": CPU, "num_blocks_per_group": 1, **options})


def offload_sequentially(pipe) -> None:
    """What diffusers does, with the CPU in the place of the accelerator; diffusers numbers it, which copies weights."""
    for name in NETWORKS:
        network = getattr(pipe, name)
        cpu_offload(network, CPU, offload_buffers=bool(network._parameters))


def places_of(pipe) -> set[str]:
    """Kinds of device on which there are weights, or what belongs to them."""
    layers = [module for name in NETWORKS for module in getattr(pipe, name).modules()]
    tensors = [tensor for layer in layers for tensor in layer.parameters(recurse=False)]
    tensors += [layer.state.CB for layer in layers if isinstance(layer, Linear8bitLt)]
    tensors += [layer.state.SCB for layer in layers if isinstance(layer, Linear8bitLt)]
    return {tensor.device.type for tensor in tensors if tensor is not None}


# --- where there is no accelerator: the CPU computes, weights wait on the CPU, on disk, or nowhere


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "diffusers' autoencoder"])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_groups_on_disk_are_fetched_before_they_run(load_wide, draw, forgetful, tmp_path, offload_type, theirs):
    pipe = load_wide()
    if theirs:
        weights = pipe.vae.state_dict()
        pipe.vae = their_autoencoder.AutoencoderDC.from_config(pipe.vae.config).to(torch.bfloat16)
        pipe.vae.load_state_dict(weights)
    expected = draw(pipe)
    offload_in_groups(pipe, offload_type=offload_type, offload_to_disk_path=str(tmp_path / "weights"))
    assert {folder.name for folder in (tmp_path / "weights").iterdir()} == set(NETWORKS)
    assert all(torch.isnan(getattr(pipe, name).state_dict()[key]).any() for name, key in SOME_WEIGHTS.items())
    for _ in range(2):
        pipe.text_cache.clear()
        assert torch.equal(draw(pipe), expected)


SOME_WEIGHTS = {
    "text_encoder": "layers.0.mlp.up_proj.weight",
    "transformer": "transformer_blocks.1.ff.conv_point.weight",
    "vae": "decoder.up_blocks.0.0.conv.weight",
}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_groups_of_networks_that_are_not_quantised_are_offloaded_beside_those_that_are(load_wide, draw, bits):
    pipe = load_wide(bits, device_map="cpu")
    expected = draw(pipe)
    offload_in_groups(pipe, exclude_modules=["text_encoder", "transformer"])
    assert torch.equal(draw(pipe), expected)


def test_weights_that_wait_outside_the_layers_are_fetched_for_each_strip(load_wide, draw):
    pipe = load_wide()
    expected = draw(pipe)
    offload_sequentially(pipe)
    assert places_of(pipe) == {"meta"}
    for _ in range(2):
        pipe.text_cache.clear()
        assert torch.equal(draw(pipe), expected)
    assert places_of(pipe) == {"meta"}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_model_offloading_takes_weights_of_any_bits(load_wide, draw, bits):
    pipe = load_wide(bits, device_map="cpu")
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        pipe.text_cache.clear()
        assert torch.equal(draw(pipe), expected)


def test_the_scales_of_8_bit_weights_and_what_else_refers_to_them_follow_the_weights(load_wide, draw):
    pipe = load_wide(8, device_map="cpu")
    layer = pipe.transformer.transformer_blocks[0].ff.conv_point
    for holder in (layer.weight, layer.state):  # before and after the first product
        layer.weight.data = layer.weight.data.clone()
        bring_scales(pipe.transformer)
        assert holder.CB.data_ptr() == layer.weight.data_ptr()
        draw(pipe)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_float8_storage_draws_about_the_same_and_may_be_offloaded(load_wide, draw, forgetful, tmp_path, name):
    pipe = load_wide()
    exact = draw(pipe)
    getattr(pipe, name).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    dtypes = [parameter.dtype for parameter in getattr(pipe, name).parameters()]
    assert torch.float8_e4m3fn in dtypes
    rough = draw(pipe)
    assert 0 < (rough - exact).abs().mean() < 0.1  # three bits of mantissa, pictures in [0, 1]
    offload_in_groups(pipe, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert torch.equal(draw(pipe), rough)
    assert [parameter.dtype for parameter in getattr(pipe, name).parameters()] == dtypes


def test_float8_storage_may_be_offloaded_layer_by_layer(load_wide, draw):
    pipe = load_wide()
    for network in (pipe.transformer, pipe.vae):
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    rough = draw(pipe)
    offload_sequentially(pipe)
    assert torch.equal(draw(pipe), rough)


# --- what cannot be, and what to do instead


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_pipeline_is_not_cast_but_moves(load_wide, draw, bits):
    pipe = load_wide(bits, device_map="cpu")
    expected = draw(pipe)
    for arguments in [(torch.float32,), ("cpu", torch.float16)]:
        with pytest.raises(
            ValueError, match=r"text_encoder is quantised .* from torch.bfloat16 .* torch_dtype=torch.f"
        ):
            pipe.to(*arguments)
    with pytest.raises(ValueError, match="cannot be cast"):
        SanaSprintPipeline.from_pipe(pipe, dtype=torch.float32)
    assert pipe.vae.dtype == torch.bfloat16
    pipe.to("cpu", torch.bfloat16).to("cpu")
    assert torch.equal(draw(pipe), expected)
    for network in (pipe.transformer, pipe.text_encoder):
        for cast in (network.half, network.float, lambda: network.to(torch.float32)):  # noqa: B023 -- called at once
            with pytest.raises(ValueError, match=r"not supported|unsupported|cannot cast"):
                cast()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_8_and_4_bits_are_not_offloaded_layer_by_layer(load_wide, bits):
    pipe = load_wide(bits, device_map="cpu")
    with pytest.raises(ValueError, match=f"text_encoder has weights of {bits} bits.*enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload(device="cuda")
    with pytest.raises(ValueError, match=f"weights of {bits} bits.*exclude_modules, or use enable_model_cpu_offload"):
        offload_in_groups(pipe)
    with pytest.raises(ValueError, match="transformer has weights"):
        offload_in_groups(pipe, exclude_modules="text_encoder")
    assert all(not hasattr(module, "_hf_hook") for name in NETWORKS for module in getattr(pipe, name).modules())


def test_sequential_offloading_to_the_cpu_is_refused(load_wide):
    with pytest.raises(ValueError, match="another device than the CPU"):
        load_wide().enable_sequential_cpu_offload(device="cpu")


def test_groups_are_offloaded_once_and_not_cast(load_wide, draw):
    pipe = load_wide()
    expected = draw(pipe)
    offload_in_groups(pipe)
    with pytest.raises(ValueError, match="text_encoder is offloaded in groups already"):
        offload_in_groups(pipe, offload_type="leaf_level")
    with pytest.raises(ValueError, match="offloaded in groups and cannot be cast to torch.float32"):
        pipe.to(torch.float32)
    with pytest.raises(ValueError, match="group offloading enabled"):
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipe), expected)


def test_one_kind_of_offloading_is_not_put_upon_another(load_wide, draw):
    pipe = load_wide()
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="Cannot apply group offloading"):
        offload_in_groups(pipe)
    assert torch.equal(draw(pipe), expected)


def test_a_folder_with_weights_of_another_run_is_refused(load_wide, tmp_path):
    offload_in_groups(load_wide(), offload_to_disk_path=str(tmp_path))
    with pytest.raises(ValueError, match="must be an empty folder"):
        offload_in_groups(load_wide(), offload_to_disk_path=str(tmp_path))


def test_a_network_to_be_left_out_must_be_one_of_the_pipelines(load_wide):
    with pytest.raises(ValueError, match="exclude_modules may hold .*'vae'.*got 'unet'"):
        offload_in_groups(load_wide(), exclude_modules=["unet"])


@needs_none
def test_4_bit_weights_that_are_packed_for_this_cpu_stay_on_it(load_wide, draw):
    pipe = load_wide(4)
    draw(pipe)
    states = [getattr(weight, "quant_state", None) for weight in pipe.text_encoder.parameters()]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes packs for CPUs with AVX512-BF16 only")
    for leave in (
        lambda: pipe.to("cuda"),
        pipe.enable_model_cpu_offload,
        lambda: offload_in_groups(pipe, onload_device="cuda", use_stream=True),
    ):
        with pytest.raises(ValueError, match="text_encoder has run on the CPU.*load it anew"):
            leave()


# --- without a text encoder


@pytest.mark.parametrize("offload", ["not", "model", "groups", "sequential"])
def test_a_text_encoder_may_be_dropped_once_prompts_are_encoded(load_wide, draw, short, offload):
    pipe = load_wide()
    expected = draw(pipe)
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif offload == "groups":
        offload_in_groups(pipe)
    elif offload == "sequential":
        offload_sequentially(pipe)
    embeds, mask = pipe.encode_prompt("a red circle", max_sequence_length=short["max_sequence_length"])
    assert embeds.grad_fn is None  # which would keep the weights
    encoder = weakref.ref(pipe.text_encoder)
    pipe.text_encoder = None
    gc.collect()
    assert encoder() is None
    given = {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    for _ in range(2):
        assert torch.equal(draw(pipe, **given), expected)
    for encode in (lambda: draw(pipe), lambda: pipe.encode_prompt("a red circle")):
        with pytest.raises(ValueError, match="without text_encoder or tokenizer needs prompt_embeds"):
            encode()


def test_saved_embeddings_draw_in_a_pipeline_that_is_loaded_without_text_encoder(load_wide, draw, short, tmp_path):
    pipe = load_wide()
    expected = draw(pipe)
    reader = load_wide(transformer=None, vae=pipe.vae)
    save_prompt_embeds(tmp_path / "circle.safetensors", *reader.encode_prompt("a red circle", max_sequence_length=16))
    blind = load_wide(text_encoder=None, tokenizer=None)
    given = load_prompt_embeds(tmp_path / "circle.safetensors")
    assert given["prompt_embeds"].shape[1] < short["max_sequence_length"]
    assert torch.equal(draw(blind, prompt=None, **given), expected)
    with pytest.raises(ValueError, match="needs prompt_embeds, got prompt"):
        draw(blind)


def test_a_network_that_is_exchanged_is_offloaded_like_the_one_before(load_wide, draw):
    pipe, other = load_wide(), load_wide()
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.transformer = other.transformer
    assert [offload.model for offload in pipe._all_hooks] == [pipe.text_encoder, pipe.transformer, pipe.vae]
    assert torch.equal(draw(pipe), expected)


# --- on a GPU


GROUPS = [
    {"offload_type": "leaf_level"},
    {"offload_type": "leaf_level", "use_stream": True},
    {"offload_type": "leaf_level", "use_stream": True, "record_stream": True, "low_cpu_mem_usage": True},
    {"offload_type": "block_level"},
    {"offload_type": "block_level", "use_stream": True},
]


@cuda
@needs_gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_model_offloading_draws_the_same_and_leaves_the_gpu_with_all_that_belongs_to_weights(load_wide, draw, bits):
    pipe = load_wide(bits).to("cuda")
    expected = draw(pipe)
    pipe.enable_model_cpu_offload()
    assert places_of(pipe) == {"cpu"}
    for _ in range(2):
        pipe.text_cache.clear()
        assert_close(draw(pipe), expected, **SAME_ON_GPU)
        assert places_of(pipe) == {"cpu"}


@cuda
@needs_gpu
def test_sequential_offloading_draws_the_same(load_wide, draw):
    pipe = load_wide().to("cuda")
    expected = draw(pipe)
    pipe.to("cpu")
    pipe.enable_sequential_cpu_offload()
    for _ in range(2):
        pipe.text_cache.clear()
        assert_close(draw(pipe), expected, **SAME_ON_GPU)
        assert places_of(pipe) == {"meta"}


@cuda
@needs_gpu
@pytest.mark.parametrize("options", GROUPS, ids=str)
@pytest.mark.parametrize("bits", [16, 4])
def test_groups_draw_the_same_and_leave_the_gpu(load_wide, draw, bits, options):
    pipe = load_wide(bits).to("cuda")
    expected = draw(pipe)
    pipe.to("cpu")
    without_streams = bits == 4 and not options.get("use_stream")
    with pytest.raises(ValueError, match="pass use_stream=True") if without_streams else nullcontext():
        offload_in_groups(pipe, **{"onload_device": "cuda", **options})
    if without_streams:
        return
    for _ in range(3):  # the first call traces the order in which the next ones fetch ahead
        pipe.text_cache.clear()
        assert_close(draw(pipe), expected, **SAME_ON_GPU)
        assert places_of(pipe) == {"cpu"}


@cuda
@needs_gpu
@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_float8_storage_in_groups_draws_what_it_draws_without_them(load_wide, draw, options):
    pipe = load_wide().to("cuda")
    for network in (pipe.transformer, pipe.vae):
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    expected = draw(pipe)
    pipe.to("cpu")
    offload_in_groups(pipe, **{"onload_device": "cuda", **options})
    for _ in range(3):
        assert_close(draw(pipe), expected, **SAME_ON_GPU)


@cuda
@needs_gpu
@pytest.mark.parametrize("bits", [16, 8])
def test_a_pipeline_that_has_drawn_on_the_cpu_draws_on_the_gpu_and_back(load_wide, draw, bits):
    pipe = load_wide(bits).to("cpu")
    on_cpu = draw(pipe)
    pipe.to("cuda")
    pipe.text_cache.clear()
    on_gpu = draw(pipe)
    assert (on_gpu - on_cpu).abs().mean() < 0.02  # bfloat16, sums in another order
    pipe.to("cpu")
    assert places_of(pipe) == {"cpu"}
    pipe.text_cache.clear()
    assert torch.equal(draw(pipe), on_cpu)


@cuda
@needs_gpu
def test_a_dropped_text_encoder_gives_its_memory_back(load_wide, draw):
    pipe = load_wide()
    pipe.enable_model_cpu_offload()
    embeds, mask = pipe.encode_prompt("a red circle", max_sequence_length=16)
    before = torch.cuda.memory_allocated()
    size = sum(parameter.nbytes for parameter in pipe.text_encoder.parameters())
    pipe.text_encoder = None
    gc.collect()
    assert before - torch.cuda.memory_allocated() >= size
    draw(pipe, prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask)
