"""What every pipeline of diffusers can do, ours can: components, casts, offloading, LoRA, compilation, saving."""

import inspect
from copy import deepcopy

import diffusers.pipelines.sana.pipeline_sana_sprint as their_pipeline
import pytest
import torch
from torch.testing import assert_close

from sana_sprint import SanaSprintPipeline

CIRCLE = "a red circle"


@pytest.fixture
def own_pipe(tiny_pipeline_parts):
    """A pipeline with components of its own, for tests that alter them."""
    pipeline = SanaSprintPipeline(**{name: deepcopy(part) for name, part in tiny_pipeline_parts.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_constructor_and_components_are_diffusers(pipe, their_pipe):
    ours, theirs = SanaSprintPipeline, their_pipeline.SanaSprintPipeline
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert ours._get_signature_keys(pipe) == theirs._get_signature_keys(their_pipe)
    assert pipe.components.keys() == their_pipe.components.keys()
    assert dict(pipe.config) == dict(their_pipe.config)


@pytest.mark.parametrize("name", ["model_cpu_offload_seq", "_optional_components", "_exclude_from_cpu_offload"])
def test_class_attributes_are_diffusers(name):
    assert getattr(SanaSprintPipeline, name) == getattr(their_pipeline.SanaSprintPipeline, name)


def test_callbacks_may_ask_for_all_that_diffusers_shows_them():
    theirs = their_pipeline.SanaSprintPipeline._callback_tensor_inputs
    assert set(theirs) <= set(SanaSprintPipeline._callback_tensor_inputs)


def test_every_public_method_of_diffusers_pipeline_is_there():
    theirs = {name for name in dir(their_pipeline.SanaSprintPipeline) if not name.startswith("_")}
    # Replaced by sana_sprint.text.cleaning, and by the clock, which knows what a scheduler's step takes.
    assert theirs - set(dir(SanaSprintPipeline)) == {"bad_punct_regex", "prepare_extra_step_kwargs"}


def test_a_pipeline_of_the_same_components_draws_the_same(pipe, short, seeded):
    other = SanaSprintPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    drawn = [one(CIRCLE, **short, generator=seeded(0)).images for one in (pipe, other)]
    assert_close(*drawn, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_draws_about_the_same(own_pipe, short, seeded, dtype):
    exact = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    assert own_pipe.to(dtype) is own_pipe
    assert {own_pipe.transformer.dtype, own_pipe.vae.dtype, own_pipe.text_encoder.dtype} == {dtype}
    rough = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    assert rough.dtype == torch.float32
    # Eight bits of bfloat16 are two digits, of latents of unit scale, after two steps of the network.
    assert (rough - exact).abs().max() < 0.1
    picture = own_pipe(CIRCLE, **{**short, "output_type": "np"}).images
    assert picture.dtype == "float32"


def test_components_may_have_different_dtypes(own_pipe, short):
    own_pipe.text_encoder.to(torch.bfloat16)
    own_pipe.vae.to(torch.bfloat16)
    assert own_pipe(CIRCLE, **{**short, "output_type": "pt"}).images.isfinite().all()


def test_model_offloading_with_the_cpu_as_accelerator_draws_the_same(own_pipe, short, seeded):
    """The hooks, their order and their removal; what they save shows on a GPU only."""
    plain = own_pipe(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
    own_pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        offloaded = own_pipe(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
        assert_close(offloaded, plain, atol=0, rtol=0)
    own_pipe.remove_all_hooks()


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_with_the_cpu_as_accelerator_draws_the_same(own_pipe, short, seeded, offload_type):
    plain = own_pipe(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
    own_pipe.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    offloaded = own_pipe(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
    assert_close(offloaded, plain, atol=0, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator to offload from")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_an_accelerator_is_refused_as_in_diffusers(own_pipe, method):
    with pytest.raises(RuntimeError, match="requires accelerator"):
        getattr(own_pipe, method)()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_draws_the_same_and_leaves_the_gpu(own_pipe, short, seeded, method):
    plain = own_pipe.to("cuda")(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
    own_pipe.to("cpu")
    getattr(own_pipe, method)()
    offloaded = own_pipe(CIRCLE, **{**short, "output_type": "pt"}, generator=seeded(0)).images
    assert_close(offloaded, plain, atol=1e-5, rtol=0)  # the same kernels; convolutions may choose another algorithm
    assert {parameter.device.type for parameter in own_pipe.transformer.parameters()} <= {"cpu", "meta"}


def test_layerwise_casting_of_the_transformer_draws_about_the_same(own_pipe, short, seeded):
    exact = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    own_pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    rough = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    assert rough.isfinite().all()
    assert 0 < (rough - exact).abs().max() < 1  # three bits of mantissa, latents of unit scale


def test_lora_layers_load_scale_and_unload(own_pipe, short, seeded, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    plain = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    torch.manual_seed(0)
    trained = deepcopy(own_pipe.transformer)
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    SanaSprintPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained))

    own_pipe.load_lora_weights(tmp_path)
    full = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    half = own_pipe(CIRCLE, **short, generator=seeded(0), attention_kwargs={"scale": 0.5}).images
    none = own_pipe(CIRCLE, **short, generator=seeded(0), attention_kwargs={"scale": 0.0}).images
    again = own_pipe(CIRCLE, **short, generator=seeded(0)).images
    assert (full - plain).abs().max() > 1e-2
    assert not half.equal(full)
    assert_close(none, plain, atol=0, rtol=0)
    assert_close(again, full, atol=0, rtol=0)
    own_pipe.unload_lora_weights()
    assert_close(own_pipe(CIRCLE, **short, generator=seeded(0)).images, plain, atol=0, rtol=0)


def test_lora_layers_of_the_text_encoder_are_scaled_for_one_call_only(own_pipe):
    from peft import LoraConfig

    torch.manual_seed(0)
    plain, _ = own_pipe.encode_prompt(CIRCLE, max_sequence_length=16)
    own_pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    full, _ = own_pipe.encode_prompt(CIRCLE, max_sequence_length=16)
    none, _ = own_pipe.encode_prompt(CIRCLE, max_sequence_length=16, lora_scale=0.0)
    assert (full - plain).abs().max() > 1e-2
    assert_close(none, plain, atol=1e-6, rtol=0)  # a sum with zeros, in float32
    half, _ = own_pipe.encode_prompt(CIRCLE, max_sequence_length=16, lora_scale=0.5)
    again, _ = own_pipe.encode_prompt(CIRCLE, max_sequence_length=16)
    assert not half.equal(full)
    assert_close(again, full, atol=0, rtol=0)


def test_a_pipeline_can_be_copied(own_pipe, short, seeded):
    drawn = [one(CIRCLE, **short, generator=seeded(0)).images for one in (own_pipe, deepcopy(own_pipe))]
    assert_close(*drawn, atol=0, rtol=0)
