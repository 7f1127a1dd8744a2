"""What every pipeline promises, kept by those with ControlNets: saving, offloading, maps, casts, callbacks, copies."""

import json
from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
from control_calls import BASES, ring, runs_of
from tiny_control import open_control
from torch.testing import assert_close

from sana_sprint import (
    SanaControlNetModel,
    SanaMultiControlNetModel,
    SanaSprintControlNetPipeline,
    SanaSprintPipeline,
)

CPU = torch.device("cpu")
# float32: products of matrices that lie elsewhere in memory may sum in another order.
LOADED = {"atol": 1e-5, "rtol": 0}
NETWORKS = ("text_encoder", "controlnet", "transformer", "vae")


@pytest.fixture
def pipe(make_controlled):
    """Text to image with an open ControlNet."""
    return make_controlled()


def test_components_may_be_diffusers_own(pipe, make_controlled, sketch):
    control = SanaControlNetModel(**{**pipe.controlnet.config, "guidance_embeds": False, "qk_norm": None}).eval()
    control.load_state_dict(pipe.controlnet.state_dict(), strict=False)  # its time embedding stays random
    theirs = diffusers.SanaControlNetModel.from_config(control.config).eval()
    theirs.load_state_dict(control.state_dict())
    transformer = diffusers.SanaTransformer2DModel.from_config(pipe.transformer.config).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    found = sketch(make_controlled(controlnet=theirs, transformer=transformer))
    # Two implementations in float32, through two steps of networks.
    assert_close(found, sketch(make_controlled(controlnet=control)), atol=1e-4, rtol=0)


def test_several_controlnets_are_saved_and_loaded_as_one_component(
    control_kind, make_controlled, beginning, sketch, tmp_path
):
    pipe = make_controlled(control_kind)
    early = open_control(pipe.transformer, seed=5, residual_placement="before").eval()
    both = make_controlled(control_kind, controlnet=[pipe.controlnet, early])
    expected = sketch(both, **beginning, control_image=[ring(), ring()])
    both.save_pretrained(tmp_path)
    loaded = control_kind.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.controlnet) is SanaMultiControlNetModel
    assert_close(sketch(loaded, **beginning, control_image=[ring(), ring()]), expected, **LOADED)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == control_kind.__name__
    assert index["controlnet"] == ["sana_sprint.plugin", "SanaMultiControlNetModel"]


def test_one_is_saved_as_diffusers_would_and_loads_as_ours(control_kind, make_controlled, beginning, sketch, tmp_path):
    pipe = make_controlled(control_kind)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "SanaControlNetModel"]
    loaded = control_kind.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.controlnet) is SanaControlNetModel
    assert_close(sketch(loaded, **beginning), sketch(pipe, **beginning), **LOADED)


@pytest.mark.parametrize("several", [False, True])
def test_controlnets_may_be_passed_to_a_folder_with_or_without_one(pipe, make_controlled, tmp_path, several):
    control = [pipe.controlnet, deepcopy(pipe.controlnet)] if several else pipe.controlnet
    pipe.save_pretrained(tmp_path / "with")
    make_controlled(SanaSprintPipeline).save_pretrained(tmp_path / "without")
    for folder in ("with", "without"):
        loaded = SanaSprintControlNetPipeline.from_pretrained(tmp_path / folder, controlnet=control)
        nets = list(loaded.controlnet.nets) if several else loaded.controlnet
        assert nets == control
        assert loaded.components.keys() == pipe.components.keys()


def test_diffusers_own_controlnets_side_by_side_are_saved_as_ours(pipe, tmp_path):
    config = {**pipe.controlnet.config, "qk_norm": None, "guidance_embeds": False}
    theirs = [diffusers.SanaControlNetModel.from_config(config) for _ in range(2)]
    SanaMultiControlNetModel.from_controlnets(theirs).save_pretrained(tmp_path)
    for net, kept in zip(theirs, SanaMultiControlNetModel.from_pretrained(tmp_path).nets, strict=True):
        assert type(kept) is SanaControlNetModel
        assert all(torch.equal(value, kept.state_dict()[name]) for name, value in net.state_dict().items())


def test_pipelines_are_made_of_one_another_with_and_without_controlnet(
    control_kind, make_controlled, beginning, sketch
):
    base, pipe = make_controlled(BASES[control_kind]), make_controlled(control_kind)
    added = control_kind.from_pipe(base, controlnet=pipe.controlnet)
    assert added.transformer is base.transformer
    assert torch.equal(sketch(added, **beginning), sketch(pipe, **beginning))
    removed = BASES[control_kind].from_pipe(pipe)
    assert "controlnet" not in removed.components
    assert torch.equal(sketch(removed, **beginning), sketch(base, **beginning))


def test_networks_run_in_the_order_that_offloading_takes(control_kind, make_controlled, beginning, sketch):
    pipe, order = make_controlled(control_kind), []
    assert tuple(control_kind.model_cpu_offload_seq.split("->")) == NETWORKS
    parts = {name: getattr(pipe, name) for name in NETWORKS[:3]}
    for name, part in {"encoder": pipe.vae.encoder, **parts, "decoder": pipe.vae.decoder}.items():
        part.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    pipe.text_cache = None
    sketch(pipe, **beginning, output_type="pt")
    encoded = ["encoder"] * (2 if beginning else 1)
    assert order == [*encoded, "text_encoder", *["controlnet", "transformer"] * 2, "decoder"]


@pytest.mark.parametrize("several", [False, True])
def test_offloading_draws_the_same(pipe, make_controlled, sketch, several):
    control = [pipe.controlnet, open_control(pipe.transformer, seed=5).eval()] if several else pipe.controlnet
    image = [ring(), ring()] if several else ring()
    pipe = make_controlled(controlnet=control)
    expected = sketch(pipe, control_image=image)
    pipe.enable_model_cpu_offload(device="cpu")
    assert [hook.model for hook in pipe._all_hooks] == [getattr(pipe, name) for name in NETWORKS]
    for _ in range(2):
        pipe.drawing_cache.clear()
        assert torch.equal(sketch(pipe, control_image=image), expected)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        pipe.drawing_cache.clear()
        assert torch.equal(sketch(pipe, control_image=image), expected)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"controlnet": "cpu"}], ids=str)
def test_a_map_names_the_controlnet_among_the_networks(pipe, sketch, tmp_path, device_map):
    pipe.save_pretrained(tmp_path)
    mapped = SanaSprintControlNetPipeline.from_pretrained(tmp_path, device_map=device_map)
    mapped.set_progress_bar_config(disable=True)
    assert_close(sketch(mapped), sketch(pipe), **LOADED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_draw_about_the_same(pipe, sketch, dtype):
    exact = sketch(pipe)
    pipe.controlnet.to(dtype)
    assert 0 < (sketch(pipe) - exact).abs().max() < 0.1  # eight bits are two digits, of latents of unit scale
    assert 0 < (sketch(pipe.to(dtype)) - exact).abs().max() < 0.2


def test_a_callback_exchanges_the_text_that_the_controlnet_reads(pipe, sketch):
    runs = runs_of(pipe.controlnet)

    def exchange(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    sketch(pipe, callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    first, second = (kwargs["encoder_hidden_states"] for _, kwargs in runs)
    assert first.any()
    assert not second.any()


def test_a_copy_draws_the_same_and_encodes_its_own_drawings(pipe, sketch):
    expected = sketch(pipe)
    copy = deepcopy(pipe)
    runs = runs_of(copy.vae.encoder)
    assert torch.equal(sketch(copy), expected)
    assert len(runs) == 1
    with torch.inference_mode():
        copy.drawing_cache.clear()
        assert torch.equal(sketch(copy), expected)
    assert torch.equal(sketch(copy), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("places", ["cuda cpu cuda cpu", "cpu cuda cpu cuda"])
def test_networks_on_two_devices_hand_over_to_each_other(pipe, sketch, tmp_path, places):
    expected = sketch(pipe)
    pipe.save_pretrained(tmp_path)
    device_map = dict(zip(NETWORKS, places.split(), strict=True))
    mapped = SanaSprintControlNetPipeline.from_pretrained(tmp_path, device_map=device_map)
    mapped.set_progress_bar_config(disable=True)
    # float32 with TF32 off by default, sums in another order.
    assert_close(sketch(mapped).cpu(), expected, atol=1e-3, rtol=0)
