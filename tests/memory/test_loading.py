"""One call to a pipeline that fits, drawn with for real, on the CPU."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from sana_sprint import (
    SanaControlNetModel,
    SanaSprintControlNetImg2ImgPipeline,
    SanaSprintControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintInpaintPipeline,
    embedded_checkpoint,
    load_pipeline,
)
from sana_sprint.memory.loading import budget_of, load_as_planned
from sana_sprint.memory.planner import ARRANGEMENTS, Arrangement, Budget, all_plans
from sana_sprint.quantisation.layers import Linear8bit, quantised_layers

PROMPT = "a red circle on white"


def drawn(pipe, **arguments: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=1, generator=generator, output_type="pt", **arguments).images


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


def test_with_room_for_everything_nothing_is_quantised():
    pipe = load_pipeline(embedded_checkpoint(), memory="4GB", device="cpu")
    assert pipe.memory_plan.arrangement == Arrangement(16, "resident")
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert not list(quantised_layers(pipe.transformer))
    assert drawn(pipe).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("quantization", "share"), [("8bit", 0.1), ("4bit", 0.4)])
def test_quantised_it_draws_nearly_the_same(quantization, share):
    exact = drawn(load_pipeline(embedded_checkpoint(), quantization="none", device="cpu"))
    pipe = load_pipeline(embedded_checkpoint(), quantization=quantization, device="cpu")
    assert f"{pipe.memory_plan.arrangement.bits}bit" == quantization
    assert len(list(quantised_layers(pipe.transformer))) == 60
    assert 0 < relative_error(drawn(pipe), exact) < share


def test_with_less_memory_there_are_fewer_bits():
    roomy = load_pipeline(embedded_checkpoint(), device="cpu", memory="4GB").memory_plan
    tight = load_pipeline(embedded_checkpoint(), device="cpu", memory=roomy.peak - 1).memory_plan
    assert tight.arrangement == Arrangement(8, "resident")
    assert tight.reason == f"16-bit, resident ({roomy.peak / 1e9:.2f} GB) would not fit"


def test_tiles_that_are_planned_are_taken():
    plan = load_pipeline(embedded_checkpoint(), device="cpu").memory_plan
    assert plan.arrangement.tile is None
    tiled = replace(plan, arrangement=replace(plan.arrangement, tile=256))
    pipe = load_as_planned(embedded_checkpoint(), tiled, torch.device("cpu"), torch.bfloat16)
    assert pipe.vae.use_tiling
    assert (pipe.vae.tile_sample_min_height, pipe.vae.tile_sample_min_width) == (256, 256)


def test_what_is_free_is_what_counts_where_nothing_is_said():
    pipe = load_pipeline(embedded_checkpoint(), device="cpu")
    assert pipe.memory_plan.budget.device is None
    assert pipe.memory_plan.budget.host > pipe.memory_plan.peak


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "2bit"}, "quantization must be one of 8bit, 4bit, none or None, got '2bit'"),
        ({"memory": "lots"}, "wanted a size such as 8GiB"),
        ({"memory": "1MB"}, "no arrangement fits 0.0 GB|no arrangement fits 1.0 MB"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(options, message, tmp_path):
    folder = tmp_path / "configs"
    for name in ("transformer", "vae", "text_encoder"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_bytes((embedded_checkpoint() / name / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder, device="cpu", **options)


def test_a_model_that_is_not_there_is_said_to_be(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_pipeline(tmp_path / "nowhere", device="cpu")


def test_a_quantised_transformer_keeps_its_bits_and_the_text_encoder_gets_what_is_asked_for(tmp_path):
    pipe = load_pipeline(embedded_checkpoint(), quantization="8bit", device="cpu")
    pipe.text_encoder = load_pipeline(embedded_checkpoint(), quantization="none", device="cpu").text_encoder
    pipe.save_pretrained(tmp_path)
    found = {}
    for quantization in ("none", "8bit", "4bit"):
        again = load_pipeline(tmp_path, quantization=quantization, device="cpu")
        found[quantization] = getattr(again.text_encoder, "quantization_method", None) is not None
        assert "transformer stays in the checkpoint's 8 bits" in str(again.memory_plan)
        assert isinstance(next(layer for _, layer in quantised_layers(again.transformer)), Linear8bit)
    assert found == {"none": False, "8bit": True, "4bit": True}


def test_a_quantised_folder_keeps_its_bits(tmp_path):
    load_pipeline(embedded_checkpoint(), quantization="8bit", device="cpu").save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, memory="4GB", device="cpu")
    assert again.memory_plan.arrangement.bits == 8
    assert again.memory_plan.to_quantise == ()
    with pytest.raises(ValueError, match="quantised to 8 bits already, asked for 16"):
        load_pipeline(tmp_path, quantization="none", device="cpu")
    assert len(list(quantised_layers(again.transformer))) == 60


@pytest.mark.parametrize("kind", [SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline])
def test_a_pipeline_that_starts_from_a_picture_is_planned_with_its_encoding(kind, picture):
    pipe = load_pipeline(embedded_checkpoint(), device="cpu", pipeline_class=kind)
    assert type(pipe) is kind
    assert [*pipe.memory_plan.stages] == ["encode picture", "encode", "denoise", "decode"]
    plain = load_pipeline(embedded_checkpoint(), device="cpu")
    assert [*plain.memory_plan.stages] == ["encode", "denoise", "decode"]
    given = {"image": picture, "strength": 0.7}
    if kind is SanaSprintInpaintPipeline:
        given["mask_image"] = torch.ones(64, 64)
    assert torch.equal(drawn(pipe, **given), drawn(kind.from_pipe(plain), **given))


@pytest.mark.parametrize(("quantization", "share"), [("8bit", 0.1), ("4bit", 0.4)])
@pytest.mark.parametrize(("control", "products"), [("after", 10), ("both", 30)])  # one block, and three
def test_a_controlnet_gets_the_bits_of_the_transformer(
    quantization, share, control, products, control_folders, picture
):
    drawings = {"control_image": [picture] * 2 if control == "both" else picture}
    options: dict[str, Any] = {"controlnet": control_folders[control], "pipeline_class": SanaSprintControlNetPipeline}
    exact = load_pipeline(embedded_checkpoint(), quantization="none", device="cpu", **options)
    pipe = load_pipeline(embedded_checkpoint(), quantization=quantization, device="cpu", **options)
    assert [*pipe.memory_plan.stages] == ["encode picture", "encode", "denoise", "decode"]
    assert "controlnet" in pipe.memory_plan.to_quantise
    numbers = [len(list(quantised_layers(one))) for one in (exact.controlnet, pipe.controlnet, pipe.transformer)]
    assert numbers == [0, products, 60]
    follows = drawn(exact, **drawings)
    assert 0 < relative_error(drawn(pipe, **drawings), follows) < share
    alone = load_pipeline(embedded_checkpoint(), quantization="none", device="cpu")
    assert relative_error(drawn(alone), follows) > 0.01


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_a_folder_with_a_controlnet_of_its_own_needs_no_other(quantization, control_folders, picture, tmp_path):
    kind = SanaSprintControlNetImg2ImgPipeline
    options: dict[str, Any] = {"memory": "4GB", "device": "cpu", "pipeline_class": kind}
    given = {"image": picture, "strength": 0.7, "control_image": picture}
    plain = load_pipeline(embedded_checkpoint(), controlnet=str(control_folders["after"]), **options)
    plain.save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, quantization=quantization, **options)
    other = load_pipeline(
        embedded_checkpoint(), quantization=quantization, controlnet=str(control_folders["after"]), **options
    )
    assert pipe.memory_plan == other.memory_plan
    assert torch.equal(drawn(pipe, **given), drawn(other, **given))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"controlnet": "somewhere"}, ValueError, "a SanaSprintPipeline has no ControlNet, got controlnet='somewhere'"),
        ({"pipeline_class": SanaSprintControlNetPipeline}, OSError, "config.json"),
        ({"pipeline_class": SanaSprintControlNetPipeline, "controlnet": "no/where/at/all"}, OSError, "no/where/at/all"),
        (
            {"pipeline_class": SanaSprintControlNetPipeline, "controlnet": embedded_checkpoint() / "transformer"},
            ValueError,
            "must be a SanaControlNetModel or a SanaMultiControlNetModel, got a SanaTransformer2DModel",
        ),
        (
            {"pipeline_class": SanaSprintControlNetPipeline, "controlnet": torch.nn.Identity()},
            ValueError,
            r"one that is loaded goes with SanaSprintControlNetPipeline\.from_pipe",
        ),
    ],
)
def test_a_controlnet_that_cannot_be_loaded_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        load_pipeline(embedded_checkpoint(), device="cpu", **options)


# Blocks come and go in streams, which a CPU has not.
ON_CPU = [one for one in ARRANGEMENTS if one.placement != "group offload"]


@pytest.mark.parametrize("arrangement", ON_CPU, ids=str)
def test_other_pipelines_are_made_of_one_that_was_loaded_as_planned(arrangement, small, control_folders, picture):
    plan = next(one for one in all_plans(small, Budget(2**40)) if one.arrangement == arrangement)

    def load(**options: Any) -> Any:
        return load_as_planned(embedded_checkpoint(), plan, torch.device("cpu"), torch.bfloat16, **options)

    pipe = load()
    before = drawn(pipe)
    start = {"image": picture, "strength": 0.7}
    redraw = SanaSprintImg2ImgPipeline.from_pipe(pipe)
    assert torch.equal(drawn(redraw, **start), drawn(load(pipeline_class=SanaSprintImg2ImgPipeline), **start))
    controlnet = SanaControlNetModel.from_pretrained(control_folders["after"], torch_dtype=torch.bfloat16)
    follow = SanaSprintControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    assert relative_error(drawn(follow, control_image=picture), before) > 0.01
    assert torch.equal(drawn(pipe), before)
    networks = [pipe.text_encoder, pipe.transformer, pipe.vae]
    assert {network.dtype for network in networks} == {torch.bfloat16}
    assert networks == [redraw.text_encoder, redraw.transformer, redraw.vae]


# What accelerate says is free: of a CPU alone, beside a GPU, on a Mac, and where a GPU shares the machine's memory.
FREE = {"cpu": {"cpu": 9}, "gpu": {0: 5, 1: 6, "cpu": 9}, "mac": {"mps": 8}, "shared": {0: 7}}


@pytest.mark.parametrize(
    ("machine", "device", "memory", "ram", "budget"),
    [
        ("cpu", "cpu", None, None, Budget(None, 9)),
        ("cpu", "cpu", 3, None, Budget(None, 3)),
        ("gpu", "cuda", None, None, Budget(5, 9)),
        ("gpu", "cuda:1", None, 2, Budget(6, 2)),
        ("gpu", "cuda", 3, None, Budget(3, None)),
        ("mac", "cpu", None, None, Budget(None, 8)),
        ("shared", "cpu", None, None, Budget(None, 7)),
        ("shared", "cuda", None, None, Budget(7, None)),
    ],
)
def test_the_budget_is_what_is_said_or_what_is_free(machine, device, memory, ram, budget, monkeypatch):
    monkeypatch.setattr("sana_sprint.memory.loading.get_max_memory", lambda: FREE[machine])
    assert budget_of(torch.device(device), memory, ram) == budget


@pytest.mark.parametrize(
    ("device", "ram", "message"),
    [
        ("mps", None, "not for mps: choose the device cpu"),
        ("cpu", 2, "ram is the machine's memory beside a GPU"),
        ("cuda:4", None, "the memory of cuda:4 is not known: give memory"),
    ],
)
def test_a_budget_that_cannot_be_known_is_refused(device, ram, message, monkeypatch):
    monkeypatch.setattr("sana_sprint.memory.loading.get_max_memory", lambda: FREE["gpu"])
    with pytest.raises(ValueError, match=message):
        budget_of(torch.device(device), None, ram)


def test_the_plan_is_made_of_the_files_that_are_loaded(tmp_path):
    digest = "0" * 40
    repository = tmp_path / "models--somebody--shapes"
    shutil.copytree(embedded_checkpoint(), repository / "snapshots" / digest)
    (repository / "refs").mkdir()
    (repository / "refs" / "small").write_text(digest)
    options = {"cache_dir": tmp_path, "revision": "small", "local_files_only": True}
    pipe = load_pipeline("somebody/shapes", device="cpu", memory="4GB", **options)
    assert drawn(pipe).shape == (1, 3, 64, 64)
    with pytest.raises(OSError, match="somebody/shapes"):
        load_pipeline("somebody/shapes", device="cpu", memory="4GB", cache_dir=tmp_path, local_files_only=True)
