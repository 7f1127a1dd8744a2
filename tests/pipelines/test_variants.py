"""What every pipeline promises, kept by those that start from a picture: casts, offloading, maps, LoRA, copies."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from torch.testing import assert_close

from sana_sprint import SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline, SanaSprintPipeline

CIRCLE = "a red circle"
CPU = torch.device("cpu")
NETWORKS = ("text_encoder", "transformer", "vae")
KINDS = [SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SAME_ON_GPU = {"atol": 0.02, "rtol": 0}  # of pictures in [0, 1]: bfloat16, a GPU's library may choose other kernels


@pytest.fixture(params=KINDS, ids=["image", "inpaint"])
def kind(request) -> type:
    return request.param


@pytest.fixture
def given(kind, pictures, right_half) -> dict[str, Any]:
    """The picture to start from, and for inpainting a mask."""
    mask = {"mask_image": right_half} if kind is SanaSprintInpaintPipeline else {}
    return {"image": pictures[0], "strength": 0.7, **mask}


@pytest.fixture
def own_pipe(kind, tiny_pipeline_parts):
    """A pipeline with components of its own, for tests that alter them."""
    pipeline = kind(**{name: deepcopy(part) for name, part in tiny_pipeline_parts.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def load_kind(kind, load_wide):
    """Loads that pipeline in bfloat16, quantised where asked."""

    def load(bits: int = 16, **options: Any) -> Any:
        pipeline = kind.from_pipe(load_wide(bits, **options))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture
def redraw(draw, given, pictures, right_half):
    """Draws from a picture of 128 by 64 pixels, always from the same seed."""
    tall = {name: torch.cat([value] * 2, -2) for name, value in given.items() if isinstance(value, torch.Tensor)}

    def picture_of(pipeline: Any, **arguments: Any) -> torch.Tensor:
        return draw(pipeline, **{**given, **tall, **arguments})

    return picture_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_draws_about_the_same(own_pipe, given, short, seeded, dtype):
    exact = own_pipe(CIRCLE, **given, **short, generator=seeded(0)).images
    own_pipe.to(dtype)
    rough = own_pipe(CIRCLE, **given, **short, generator=seeded(0)).images
    assert rough.dtype == torch.float32
    # Eight bits of bfloat16 are two digits, of latents of unit scale, after the encoder and two steps of the network.
    assert (rough - exact).abs().max() < 0.1
    assert own_pipe(CIRCLE, **given, **{**short, "output_type": "np"}).images.dtype == "float32"


def test_encoding_is_not_rounded_to_the_dtype_of_its_network(own_pipe, given):
    exact = own_pipe.encode_image(given["image"], 64, 64)
    own_pipe.vae.to(torch.bfloat16)
    rough = own_pipe.encode_image(given["image"], 64, 64)
    assert rough.dtype == exact.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_model_offloading_draws_the_same(load_kind, redraw, bits):
    pipe = load_kind(bits, device_map="cpu") if bits != 16 else load_kind()
    expected = redraw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        pipe.text_cache.clear()
        assert torch.equal(redraw(pipe), expected)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_draws_the_same(load_kind, redraw, tmp_path, offload_type):
    pipe = load_kind()
    expected = redraw(pipe)
    pipe.enable_group_offload(
        CPU, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "weights")
    )
    for _ in range(2):
        pipe.text_cache.clear()
        assert torch.equal(redraw(pipe), expected)


def test_a_pipeline_made_from_an_offloaded_one_is_offloaded_and_both_go_on(kind, load_wide, draw, redraw):
    plain = load_wide()
    expected, drawn = redraw(kind.from_pipe(plain)), draw(plain)
    plain.enable_model_cpu_offload(device="cpu")
    other = kind.from_pipe(plain)
    assert [offload.model for offload in other._all_hooks] == [getattr(plain, name) for name in NETWORKS]
    for _ in range(2):
        assert torch.equal(redraw(other), expected)
        assert torch.equal(draw(plain), drawn)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"transformer": "cpu"}], ids=str)
def test_a_map_by_network_draws_what_is_drawn_without_it(kind, wide_folder, load_kind, redraw, device_map):
    pipe = kind.from_pretrained(wide_folder, torch_dtype=torch.bfloat16, device_map=device_map)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(redraw(pipe), redraw(load_kind()))


def test_a_text_encoder_may_be_dropped_once_prompts_are_encoded(load_kind, redraw, short):
    pipe = load_kind()
    expected = redraw(pipe)
    embeds, mask = pipe.encode_prompt(CIRCLE, max_sequence_length=short["max_sequence_length"])
    pipe.text_encoder = None
    assert torch.equal(redraw(pipe, prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask), expected)


def test_lora_layers_load_scale_and_unload(own_pipe, kind, given, short, seeded, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    arguments = {"prompt": CIRCLE, **given, **short}
    plain = own_pipe(**arguments, generator=seeded(0)).images
    torch.manual_seed(0)
    trained = deepcopy(own_pipe.transformer)
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    SanaSprintPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained))
    own_pipe.load_lora_weights(tmp_path)
    full = own_pipe(**arguments, generator=seeded(0)).images
    none = own_pipe(**arguments, generator=seeded(0), attention_kwargs={"scale": 0.0}).images
    assert (full - plain).abs().max() > 1e-2
    assert_close(none, plain, atol=0, rtol=0)
    own_pipe.unload_lora_weights()
    assert_close(own_pipe(**arguments, generator=seeded(0)).images, plain, atol=0, rtol=0)


def test_a_pipeline_can_be_copied_and_runs_under_inference_mode(own_pipe, given, short, seeded):
    drawn = [one(CIRCLE, **given, **short, generator=seeded(0)).images for one in (own_pipe, deepcopy(own_pipe))]
    assert_close(*drawn, atol=0, rtol=0)
    with torch.inference_mode():
        assert torch.equal(own_pipe(CIRCLE, **given, **short, generator=seeded(0)).images, drawn[0])


def test_residuals_of_a_controlnet_reach_the_transformer(own_pipe, given, short, seeded):
    """The hook that a pipeline with a ControlNet is made from: it hands them to `flow_velocity`."""

    class Controlled(type(own_pipe)):
        strength = 0.0

        def flow_velocity(self, latents, time, conditioning, controlnet_block_samples=None):
            ramp = torch.linspace(-1, 1, 16)
            residuals = [self.strength * ramp.expand(len(latents), 64, 16)]
            return super().flow_velocity(latents, time, conditioning, residuals)

    controlled = Controlled(**own_pipe.components)
    controlled.set_progress_bar_config(disable=True)
    plain = own_pipe(CIRCLE, **given, **short, generator=seeded(0)).images
    assert_close(controlled(CIRCLE, **given, **short, generator=seeded(0)).images, plain, atol=0, rtol=0)
    controlled.strength = 1.0
    assert (controlled(CIRCLE, **given, **short, generator=seeded(0)).images - plain).abs().max() > 1e-3


def test_the_picture_is_encoded_before_the_text_is_read(own_pipe, given, short):
    """So that under model offloading no two networks are in memory at a time."""
    order = []
    parts = {
        "encoder": own_pipe.vae.encoder,
        "text": own_pipe.text_encoder,
        "transformer": own_pipe.transformer,
        "decoder": own_pipe.vae.decoder,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    own_pipe.text_cache = None
    own_pipe(CIRCLE, **given, **{**short, "output_type": "pt"})
    assert order == ["encoder", "text", "transformer", "transformer", "decoder"]


class NotedOffload(CpuOffload):
    """accelerate's hook of model offloading, which notes when its network goes back to where it waits."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.offloads = 0

    def init_hook(self, module):
        self.offloads += 1
        return super().init_hook(module)


def test_the_autoencoder_is_put_away_once_it_has_encoded(own_pipe, given):
    hook = NotedOffload()
    add_hook_to_module(own_pipe.vae, hook)
    before = hook.offloads
    own_pipe.encode_image(given["image"], 64, 64)
    assert hook.offloads == before + 1


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_model_offloading_keeps_one_network_on_the_gpu_at_a_time(load_kind, redraw, bits):
    pipe = load_kind(bits).to("cuda")
    expected = redraw(pipe)
    pipe.enable_model_cpu_offload()
    seen = []

    def note(*_):
        seen.append({name for name in NETWORKS if next(getattr(pipe, name).parameters()).device.type == "cuda"})

    hooks = [part.register_forward_pre_hook(note) for part in (pipe.vae.encoder, pipe.vae.decoder, pipe.transformer)]
    hooks.append(pipe.text_encoder.layers[0].register_forward_pre_hook(note))
    for _ in range(2):
        pipe.text_cache.clear()
        assert_close(redraw(pipe), expected, **SAME_ON_GPU)
    for hook in hooks:
        hook.remove()
    assert {frozenset(one) for one in seen} == {frozenset({name}) for name in NETWORKS}


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("places", [("cpu", "cuda", "cpu"), ("cuda", "cpu", "cuda"), ("cuda", "cuda", "cpu")], ids=str)
def test_networks_on_two_devices_hand_over_to_each_other(kind, wide_folder, load_kind, redraw, places):
    pipe = kind.from_pretrained(
        wide_folder, torch_dtype=torch.bfloat16, device_map=dict(zip(NETWORKS, places, strict=True))
    )
    pipe.set_progress_bar_config(disable=True)
    # bfloat16 on two devices: sums in another order, some dozens of layers.
    assert (redraw(pipe) - redraw(load_kind())).abs().mean() < 0.02


@pytest.mark.cuda
@needs_gpu
def test_what_is_kept_on_a_gpu_is_the_input_bit_for_bit(load_wide, draw, pictures, right_half):
    pipe = SanaSprintInpaintPipeline.from_pipe(load_wide().to("cuda"))
    pipe.set_progress_bar_config(disable=True)
    for device in ("cpu", "cuda"):
        drawn = draw(pipe, image=pictures[0].to(device), mask_image=right_half.to(device), height=64)
        assert torch.equal(drawn[0, ..., :32], pictures[0][..., :32])
