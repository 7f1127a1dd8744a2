"""A transformer, a DC-AE and a Gemma-2 to a whole pipeline's folder, and from one to its models."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoint_files import assert_equal, contents, names_in, run
from safetensors.torch import save_file

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.convert import Report
from sana_sprint.transformer.model import SanaTransformer2DModel

PIPELINE_SETTINGS = {"attention_head_dim": 8, "cross_attention_head_dim": 8, "sample_size": 8}


@pytest.fixture(scope="module")
def parts(tiny_pipeline_parts, tmp_path_factory) -> dict[str, Path]:
    """The tiny pipeline as people have one: the transformer as a .pth file, the text encoder with its tokenizer."""
    from transformers import Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline_parts["transformer"].save_pretrained(folder / "transformer")
    run(folder / "transformer", folder / "transformer.pth", to="original")
    tiny_pipeline_parts["vae"].save_pretrained(folder / "vae")
    language = Gemma2ForCausalLM(tiny_pipeline_parts["text_encoder"].config)
    language.model.load_state_dict(tiny_pipeline_parts["text_encoder"].state_dict())
    language.save_pretrained(folder / "gemma")
    tiny_pipeline_parts["tokenizer"].save_pretrained(folder / "gemma")
    return {"source": folder / "transformer.pth", "vae": folder / "vae", "text_encoder": folder / "gemma"}


def whole(parts: dict[str, Path], output: Path, **options: Any) -> Report:
    return run(output=output, full_pipeline=True, **{"settings": PIPELINE_SETTINGS, **parts, **options})


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "max_sequence_length": 16, "use_resolution_binning": False, "output_type": "pt"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images


def test_a_whole_pipeline_draws_what_its_parts_do_in_both_libraries(parts, tiny_pipeline_parts, tmp_path):
    from sana_sprint import SanaSprintPipeline

    whole(parts, tmp_path / "pipeline")
    wanted = draw(SanaSprintPipeline(**tiny_pipeline_parts))
    ours = SanaSprintPipeline.from_pretrained(tmp_path / "pipeline")
    # The same numbers, but loaded they may lie at other addresses, and kernels sum in another order there.
    torch.testing.assert_close(draw(ours), wanted, atol=1e-5, rtol=0)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(theirs) is diffusers.SanaSprintPipeline
    # Values in [0, 1]; two implementations in float32.
    torch.testing.assert_close(draw(theirs), wanted, atol=1e-4, rtol=0)


def test_a_whole_pipeline_is_the_folder_that_the_pipeline_saves(parts, tiny_pipeline_parts, tmp_path):
    from sana_sprint import SanaSprintPipeline

    whole(parts, tmp_path / "pipeline")
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(tmp_path / "saved")
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        ours, saved = (json.loads((tmp_path / folder / name).read_text()) for folder in ("pipeline", "saved"))
        assert ours == saved, name
    assert names_in(tmp_path / "pipeline") == names_in(tmp_path / "saved")


def test_a_pipelines_parts_may_come_from_another_pipeline(parts, tmp_path):
    whole(parts, tmp_path / "first")
    whole({**parts, "vae": tmp_path / "first", "text_encoder": tmp_path / "first"}, tmp_path / "second")
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)


@pytest.mark.parametrize(
    ("asked", "wanted"), [(None, "DPMSolverMultistepScheduler"), ("flow-euler", "FlowMatchEulerDiscreteScheduler")]
)
def test_a_flow_models_pipeline_is_sanas_with_a_flow_scheduler(parts, tiny_pipeline_parts, tmp_path, asked, wanted):
    config = {**tiny_pipeline_parts["transformer"].config, "guidance_embeds": False, "qk_norm": None}
    SanaTransformer2DModel.from_config(config).save_pretrained(tmp_path / "flow")
    whole({**parts, "source": tmp_path / "flow"}, tmp_path / "pipeline", scheduler=asked, settings={})
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == ("SanaPipeline", wanted)
    shift = pipe.scheduler.config.get("flow_shift", pipe.scheduler.config.get("shift"))
    assert shift == 3.0
    with pytest.raises(ValueError, match="scm is for SANA-Sprint"):
        whole({**parts, "source": tmp_path / "flow"}, tmp_path / "other", scheduler="scm", settings={})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vae": None}, "name all three"),
        ({"scheduler": "flow-euler"}, "is sampled with scm"),
        ({"text_encoder": "vae"}, "must be a Gemma-2"),
        ({"vae": "source"}, "holds no autoencoder but one transformer"),
        ({"text_encoder": "empty"}, "no folder of a text encoder"),
    ],
)
def test_parts_that_make_no_pipeline_are_refused(parts, tmp_path, change, named):
    (tmp_path / "empty").mkdir()
    places = {**parts, "empty": tmp_path / "empty"}
    change = {key: places.get(value, value) for key, value in change.items()}
    with pytest.raises(ValueError, match=named):
        whole({**parts, **change}, tmp_path / "pipeline")
    assert names_in(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("pointer", "Git LFS pointer"),
        ("cut", "no intact safetensors file"),
        ("shard missing", "names a shard that is not there"),
        ("another model's", "has 2 layers, its weights have 0"),
        ("pickled", "no weights in safetensors format"),
        ("absent", "holds no weights"),
    ],
)
def test_a_text_encoder_that_is_not_whole_is_refused(parts, tmp_path, damage, named):
    folder = tmp_path / "in"
    shutil.copytree(parts["text_encoder"], folder)
    weights = folder / "model.safetensors"
    if damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "another model's":
        save_file({"weight": torch.zeros(2)}, weights)
    else:
        weights.unlink()
    if damage == "shard missing":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "pickled":
        torch.save({"model.norm.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=named):
        whole({**parts, "text_encoder": folder}, tmp_path / "pipeline")
    assert names_in(tmp_path) == ["in"]


def test_a_sharded_text_encoder_is_copied_with_its_index(parts, tmp_path):
    from transformers import Gemma2Model

    Gemma2Model.from_pretrained(parts["text_encoder"]).save_pretrained(tmp_path / "gemma", max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parts["text_encoder"] / name, tmp_path / "gemma")
    whole({**parts, "text_encoder": tmp_path / "gemma"}, tmp_path / "pipeline")
    copied = Gemma2Model.from_pretrained(tmp_path / "pipeline" / "text_encoder").state_dict()
    assert len(list((tmp_path / "pipeline" / "text_encoder").glob("*.safetensors"))) > 2
    assert_equal(copied, Gemma2Model.from_pretrained(parts["text_encoder"]).state_dict())


def test_a_whole_pipeline_tells_what_was_guessed_of_its_autoencoder(parts, tmp_path):
    told = whole(parts, tmp_path / "pipeline")
    assert told.vae is not None
    assert told.vae.doubts == ()
    run(parts["vae"], tmp_path / "vae.safetensors", to="original")
    guessed = whole({**parts, "vae": tmp_path / "vae.safetensors"}, tmp_path / "guessed")
    assert guessed.vae is not None
    assert {doubt.setting for doubt in guessed.vae.doubts} == {"scaling_factor", "decoder_conv_act_fn"}


def test_a_text_encoder_or_autoencoder_of_another_width_is_refused(parts, tmp_path):
    config = json.loads((parts["text_encoder"] / "config.json").read_text())
    other = tmp_path / "gemma"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="captions of width 32, the text encoder in .* gives 64"):
        whole({**parts, "text_encoder": other}, tmp_path / "pipeline")
    vae = AutoencoderDC.load_config(parts["vae"])
    AutoencoderDC.from_config({**vae, "latent_channels": 8}).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="latents of 4 channels, those of .*vae have 8"):
        whole({**parts, "vae": tmp_path / "vae"}, tmp_path / "pipeline")


def test_of_a_pipelines_folder_the_kind_asked_for_is_converted(parts, tmp_path):
    whole(parts, tmp_path / "pipeline")
    run(tmp_path / "pipeline", tmp_path / "vae", kind="autoencoder")
    assert_equal(contents(tmp_path / "vae"), contents(parts["vae"]))
    run(tmp_path / "pipeline", tmp_path / "transformer", kind="transformer")
    assert_equal(contents(tmp_path / "transformer"), contents(tmp_path / "pipeline" / "transformer"))
    with pytest.raises(ValueError, match="pipeline, but controlnet/config.json is missing"):
        run(tmp_path / "pipeline", tmp_path / "control", kind="controlnet")
