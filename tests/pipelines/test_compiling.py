"""A compiled pipeline: the same pictures, nothing compiled twice or later, and what it refuses before it begins."""

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from control_calls import ring
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from tiny_control import open_control
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.testing import assert_close

from sana_sprint import (
    SanaSprintControlNetImg2ImgPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    compile_pipeline,
)
from sana_sprint.pipelines.clock import clock_for
from sana_sprint.pipelines.coding import _in_small_parts
from sana_sprint.quantisation import float8
from sana_sprint.trigflow.scheduler import INTERMEDIATE_TIMESTEPS, MAX_TIMESTEPS

ASTRONAUT = "a tiny astronaut hatching from an egg on the moon"
PROMPTS = ("a red circle", ASTRONAUT, ", ".join([ASTRONAUT] * 3))  # two for the first of LENGTHS, one for the second
LENGTHS = (32, 64)
CALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "pt"}
# float32: the same operations; masked tokens have no weight, but sums over more of them are taken in another order.
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def own_pipeline(parts: dict[str, Any], **others: Any) -> SanaSprintPipeline:
    """A pipeline with components of its own, for these tests alter them."""
    pipeline = SanaSprintPipeline(**{name: deepcopy(part) for name, part in {**parts, **others}.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compiled(pipe: SanaSprintPipeline, **options: Any) -> SanaSprintPipeline:
    """Compiled by the backend that takes seconds: it runs what was traced as it is."""
    sizes = {"sizes": [(64, 64)], "steps": (1,), "text_lengths": LENGTHS, "use_resolution_binning": False}
    return compile_pipeline(pipe, **{**sizes, "backend": "eager", **options})


def drawn(pipe: SanaSprintPipeline, prompt: Any, steps: int, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=steps, generator=generator, **{**CALL, **options}).images


@pytest.fixture(scope="module")
def ready(tiny_pipeline_parts):
    """A compiled pipeline, the log of its preparation, and what torch counted at its end."""
    torch._dynamo.reset()
    counters.clear()
    records: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("sana_sprint.pipelines.compiling"), logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        pipe = compiled(own_pipeline(tiny_pipeline_parts))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    yield pipe, [record.getMessage() for record in records]
    torch._dynamo.reset()


def test_there_is_no_graph_break_and_one_graph_for_each_network_and_length(ready):
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2 * len(LENGTHS) + 1  # text and transformer, and one decoder


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_pictures_are_the_same_and_nothing_is_compiled_any_more(ready, pipe, steps):
    for prompt in PROMPTS:
        expected = drawn(pipe, prompt, steps)
        with dynamo_config.patch(error_on_recompile=True):
            assert_close(drawn(ready[0], prompt, steps), expected, **CLOSE)


def test_prompts_are_of_both_lengths(pipe):
    found = [pipe.encode_prompt(prompt)[1].sum().item() for prompt in PROMPTS]
    assert found[0] < found[1] <= LENGTHS[0] < found[2] <= LENGTHS[1]


def test_what_is_done_is_logged_and_nothing_else_shown(ready, tiny_pipeline_parts, capfd):
    said = "\n".join(ready[1])
    for part in ("transformer: torch.compile of the whole", "vae.decoder: torch", "text behind an instruction: torch"):
        assert part in said
    assert said.count("warm-up: 64x64 pixels, batch 1") == len(LENGTHS)
    pipe = own_pipeline(tiny_pipeline_parts, text_encoder=None, vae=None)
    pipe.set_progress_bar_config(disable=False, desc="mine")
    compiled(pipe, text_lengths=(8,))
    assert capfd.readouterr() == ("", "")
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}


def test_a_second_call_compiles_nothing_and_other_settings_are_refused(ready):
    pipe, _ = ready
    before = counters["stats"]["unique_graphs"]
    reader = pipe.text_cache.reading.read_behind
    with dynamo_config.patch(error_on_recompile=True):
        compiled(pipe)
    assert counters["stats"]["unique_graphs"] == before
    assert pipe.text_cache.reading.read_behind is reader
    with pytest.raises(ValueError, match=r"transformer is compiled already, with .*regional=False.*\(load it anew\)"):
        compiled(pipe, regional=True)


def test_blocks_alone_draw_the_same_and_a_batch_is_warm(tiny_pipeline_parts, pipe):
    ours = own_pipeline(tiny_pipeline_parts)
    compiled(ours, regional=True, batch_sizes=(2,), text_lengths=LENGTHS[:1])
    prompts = list(PROMPTS[:2])
    with dynamo_config.patch(error_on_recompile=True):
        found = drawn(ours, prompts, 2)
    assert_close(found, drawn(pipe, prompts, 2), **CLOSE)


def test_float8_rounds_the_transformer_and_says_so(tiny_pipeline_parts, pipe, caplog):
    pytest.importorskip("torchao", reason="torchao is not installed")
    ours = own_pipeline(tiny_pipeline_parts)
    with caplog.at_level(logging.INFO, "sana_sprint.pipelines.compiling"):
        compiled(ours, float8=True, text_lengths=LENGTHS[:1])
        compiled(ours, float8=True, text_lengths=LENGTHS[:1])
    assert caplog.text.count("transformer: products in float8, which are rounded") == 1
    found, expected = (drawn(one, PROMPTS[0], 2) for one in (ours, pipe))
    assert not torch.equal(found, expected)
    assert_close(found, expected, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match=r"transformer is compiled already, with .*float8=True.*\(load it anew\)"):
        compiled(ours)


def test_float8_is_refused_beside_adapters_twice_and_without_torchao(tiny_pipeline_parts, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    pipe = own_pipeline(tiny_pipeline_parts)
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"transformer has adapters, .* unload_lora_weights\(\)"):
        compiled(pipe, float8=True)
    pipe.transformer.delete_adapters("default")
    float8.quantise_to_float8(pipe.transformer)
    with pytest.raises(ValueError, match="cannot be compiled: transformer is quantised already"):
        compiled(pipe, float8=True)
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sana-sprint\[float8\]"):
        compiled(pipe, float8=True)
    assert pipe.transformer._compiled_call_impl is None


def test_more_shapes_than_torch_compiles_by_itself_are_warm(tiny_pipeline_parts):
    pipe = own_pipeline(tiny_pipeline_parts, text_encoder=None, vae=None)
    lengths = (4, 6, 8)
    embeds, mask = torch.zeros(1, 8, pipe.transformer.config.caption_channels), torch.ones(1, 8, dtype=torch.long)
    with dynamo_config.patch(recompile_limit=1):
        compiled(pipe, regional=True, text_lengths=lengths)
    with dynamo_config.patch(error_on_recompile=True):
        for length in lengths:
            text = {"prompt_embeds": embeds[:, :length], "prompt_attention_mask": mask[:, :length]}
            drawn(pipe, None, 1, **text, output_type="latent")


@pytest.mark.parametrize(
    ("placements", "regional"), [(["after"], True), (["before"], False), (["after", "before"], False)], ids=str
)
def test_controlnets_are_compiled_too_and_their_scale_may_change(make_controlled, placements, regional):
    plain = make_controlled()
    nets = [open_control(plain.transformer, residual_placement=placement).eval() for placement in placements]
    plain = make_controlled(controlnet=nets if nets[1:] else nets[0])
    ours = make_controlled(controlnet=deepcopy(plain.controlnet))
    images = [ring()] * len(nets) if nets[1:] else ring()
    torch._dynamo.reset()
    counters.clear()
    compiled(ours, regional=regional, text_lengths=LENGTHS[:1], control_image=images)
    for net in ours.controlnet.nets if nets[1:] else [ours.controlnet]:
        assert (net.transformer_blocks[0] if regional else net)._compiled_call_impl is not None
    with dynamo_config.patch(error_on_recompile=True):
        for scale in (1.0, 0.6):
            call = {"control_image": images, "controlnet_conditioning_scale": scale}
            assert_close(drawn(ours, PROMPTS[0], 2, **call), drawn(plain, PROMPTS[0], 2, **call), **CLOSE)
    assert not counters["graph_break"]


def test_pictures_that_calls_start_from_are_asked_for_before_anything_is_done(make_controlled):
    pipe = make_controlled(SanaSprintControlNetImg2ImgPipeline)
    with pytest.raises(ValueError, match="warmed up with pictures like those to come: pass image and control_image"):
        compiled(pipe)
    with pytest.raises(ValueError, match="calls of SanaSprintControlNetImg2ImgPipeline have no drawing"):
        compiled(pipe, drawing=ring())
    with pytest.raises(ValueError, match="the warm-up chooses height and prompt itself: say sizes"):
        compiled(pipe, height=64, prompt=PROMPTS[0])
    pictures = {"image": ring(), "control_image": ring()}
    for wrong, message in (({"strength": 2}, "strength"), ({"guidance_scale": float("nan")}, "guidance_scale")):
        with pytest.raises(ValueError, match=message):
            compiled(pipe, **pictures, **wrong)
        assert "draw" not in vars(pipe)
    pipe.controlnet = None
    with pytest.raises(ValueError, match="cannot be compiled: it has no controlnet"):
        compiled(pipe)
    assert pipe.transformer._compiled_call_impl is None


def test_a_network_of_diffusers_has_no_regions(tiny_pipeline_parts, their_parts):
    pipe = own_pipeline({**tiny_pipeline_parts, "transformer": their_parts["transformer"]})
    with pytest.raises(ValueError, match=r"transformer is of diffusers' class, .* \(regional=False\)"):
        compiled(pipe, regional=True)


def test_weights_of_convolutions_are_channels_last(ready):
    pipe, _ = ready
    weights = [
        weight for network in (pipe.transformer, pipe.vae) for weight in network.parameters() if weight.ndim == 4
    ]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_for_lack_of_memory_the_autoencoder_decodes_as_it_is_written(tiny_pipeline_parts):
    vae = deepcopy(tiny_pipeline_parts["vae"])
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        vae.decoder.compile(backend=count)
        with _in_small_parts(vae):
            assert torch.equal(vae.decode(latents).sample, expected)
        assert not graphs
        vae.decode(latents)
    assert graphs


def group_offloaded(pipe):
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def hooked(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def mapped(pipe):
    pipe.hf_device_map = {"transformer": "cuda", "vae": "cpu"}


OBSTACLES = [
    (group_offloaded, r"transformer is offloaded"),
    (hooked, r"text_encoder is offloaded .*; vae is offloaded .*; transformer is offloaded"),
    (mapped, r"a device_map has put it on several devices"),
    (lambda pipe: pipe.enable_vae_slicing(), r"decodes pictures one by one \(disable_vae_slicing\(\)\)"),
    (lambda pipe: setattr(pipe, "transformer", None), r"it has no transformer"),
]


@pytest.mark.parametrize(("arrange", "message"), OBSTACLES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_compiled_is_refused_before_anything_is_done(tiny_pipeline_parts, arrange, message):
    pipe = own_pipeline(tiny_pipeline_parts)
    arrange(pipe)
    with pytest.raises(ValueError, match=f"this pipeline cannot be compiled: .*{message}"):
        compiled(pipe)
    assert pipe.text_lengths == ()
    assert pipe.vae.decoder._compiled_call_impl is None


def test_networks_quantised_by_bitsandbytes_are_refused(load_wide):
    with pytest.raises(ValueError, match="text_encoder has weights of 4 bits by bitsandbytes .*; transformer has"):
        compiled(load_wide(4))


def test_nothing_need_be_warmed_up(tiny_pipeline_parts):
    pipe = own_pipeline(tiny_pipeline_parts)
    compiled(pipe, steps=())
    assert pipe.transformer._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fastest"}, "mode must be one of"),
        ({"text_lengths": (64, 32)}, r"ascending, got \(64, 32\)"),
        ({"text_lengths": ()}, r"one length or several, ascending, got \(\)"),
        ({"batch_sizes": (0,)}, "batch_sizes must be a positive whole number, got 0"),
        ({"steps": (1.5,)}, "steps must be a positive whole number, got 1.5"),
        ({"sizes": [(64, 60)]}, "got 64x60"),
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_done(tiny_pipeline_parts, options, message):
    pipe = own_pipeline(tiny_pipeline_parts)
    with pytest.raises(ValueError, match=message):
        compiled(pipe, **options)
    assert pipe.transformer._compiled_call_impl is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_on_a_gpu_graphs_draw_the_same_and_results_are_not_overwritten(tiny_pipeline_parts, regional):
    pipe = own_pipeline(tiny_pipeline_parts).to("cuda")
    expected = [drawn(pipe, prompt, steps).cpu() for prompt in PROMPTS for steps in (1, 2, 4)]
    compiled(pipe, regional=regional, steps=(1, 2, 4), backend="inductor")
    found = [drawn(pipe, prompt, steps) for prompt in PROMPTS for steps in (1, 2, 4)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one.cpu(), other, atol=1e-2, rtol=0)  # TF32, in convolutions


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_residuals_of_two_controlnets_are_not_overwritten(make_controlled):
    pipe = make_controlled()
    nets = [open_control(pipe.transformer, seed=seed).eval() for seed in (0, 5)]
    pipe, call = make_controlled(controlnet=nets), {"control_image": [ring(), ring()]}
    expected = [drawn(pipe, prompt, steps, **call) for prompt in PROMPTS for steps in (1, 2)]
    compiled(pipe.to("cuda"), steps=(1, 2), backend="inductor", **call)
    found = [drawn(pipe, prompt, steps, **call) for prompt in PROMPTS for steps in (1, 2)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one.cpu(), other, atol=1e-2, rtol=0)  # TF32, in convolutions


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "scheduler", [SCMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=lambda one: type(one).__name__
)
def test_on_a_gpu_no_step_waits_for_it(scheduler):
    device, clock = torch.device("cuda"), clock_for(scheduler)
    clock.set_steps(4, None, MAX_TIMESTEPS, INTERMEDIATE_TIMESTEPS, device)
    generator = torch.Generator(device).manual_seed(0)
    latents = clock.from_noise(torch.randn(2, 4, 8, 8, device=device, generator=generator))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(len(clock.timesteps)):
            latents, _ = clock.step(lambda x, time: x * time.view(-1, 1, 1, 1), index, latents, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.isfinite().all()
