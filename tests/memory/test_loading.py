"""One call to a pipeline that fits, drawn with for real, on the CPU."""

from dataclasses import replace

import pytest
import torch

from sana_sprint import embedded_checkpoint, load_pipeline
from sana_sprint.memory.loading import load_as_planned
from sana_sprint.memory.planner import Arrangement
from sana_sprint.quantisation.layers import Linear8bit, quantised_layers

PROMPT = "a red circle on white"


def drawn(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").images


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
    assert len(list(quantised_layers(pipe.transformer))) == 50
    assert 0 < (drawn(pipe) - exact).norm() / exact.norm() < share


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
    assert len(list(quantised_layers(again.transformer))) == 50
