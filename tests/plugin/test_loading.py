"""Folders: published ones load as ours, ours load in diffusers, and both draw the same from either."""

import json
import logging
import shutil

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as TheirAutoencoder
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as TheirTransformer
from diffusers.pipelines.sana.pipeline_sana_sprint import SanaSprintPipeline as TheirPipeline
from diffusers.schedulers.scheduling_scm import SCMScheduler as TheirScheduler
from torch.testing import assert_close

from sana_sprint import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

OURS = {"transformer": SanaTransformer2DModel, "vae": AutoencoderDC, "scheduler": SCMScheduler}
THEIRS = {"transformer": TheirTransformer, "vae": TheirAutoencoder, "scheduler": TheirScheduler}
# Of pictures in [0, 1]. Weights that were loaded may lie at other addresses, where some kernels sum in another order.
LOADED = 1e-5
CALL = {
    "prompt": "a red circle",
    "height": 64,
    "width": 64,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
    "output_type": "pt",
}


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL, generator=torch.Generator().manual_seed(0)).images


def classes_of(pipe) -> dict[str, type]:
    return {name: type(getattr(pipe, name)) for name in OURS}


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    """The tiny pipeline, saved by diffusers."""
    where = tmp_path_factory.mktemp("published") / "pipeline"
    TheirPipeline.from_pretrained(folder).save_pretrained(where)
    return where


def test_a_folder_published_for_diffusers_loads_as_our_classes(published):
    pipe = SanaSprintPipeline.from_pretrained(published)
    assert type(pipe) is SanaSprintPipeline
    assert classes_of(pipe) == OURS


def test_a_repository_of_the_hub_loads_as_our_classes(published, tmp_path):
    """From the hub's cache, as it is after a download."""
    cached = tmp_path / "models--owner--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(published, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    pipe = SanaSprintPipeline.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert classes_of(pipe) == OURS


def test_loading_leaves_diffusers_as_it_was(published):
    SanaSprintPipeline.from_pretrained(published)
    pipe = diffusers.DiffusionPipeline.from_pretrained(published)
    assert type(pipe) is TheirPipeline
    assert classes_of(pipe) == THEIRS


def test_a_folder_of_ours_names_diffusers_and_nothing_of_ours(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    for name, kind in OURS.items():
        assert index[name] == ["diffusers", kind.__name__]
        config = "scheduler_config.json" if name == "scheduler" else "config.json"
        assert json.loads((folder / name / config).read_text())["_class_name"] == kind.__name__
    texts = [path.read_text() for path in folder.rglob("*.json")]
    assert not any("sana_sprint" in text for text in texts)


def test_a_folder_of_ours_is_the_folder_diffusers_saves(folder, published):
    names = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert names == sorted(path.relative_to(published) for path in published.rglob("*"))
    for name in [one for one in names if one.suffix == ".json" and one.parts[0] != "tokenizer"]:
        ours, theirs = (json.loads((where / name).read_text()) for where in (folder, published))
        theirs.pop("_name_or_path", None)  # diffusers' was loaded from a folder
        assert ours == theirs


def test_a_folder_of_ours_draws_the_same_in_diffusers_and_of_diffusers_in_ours(folder, published, tiny_pipeline_parts):
    original = draw(SanaSprintPipeline(**tiny_pipeline_parts))
    assert_close(draw(SanaSprintPipeline.from_pretrained(folder)), original, atol=LOADED, rtol=0)
    assert_close(draw(SanaSprintPipeline.from_pretrained(published)), original, atol=LOADED, rtol=0)
    theirs = draw(TheirPipeline.from_pretrained(folder))
    assert_close(draw(TheirPipeline.from_pretrained(published)), theirs, atol=LOADED, rtol=0)
    assert_close(theirs, original, atol=1e-4, rtol=0)  # values in [0, 1]; two implementations in float32


def test_components_passed_by_the_caller_are_kept(published):
    theirs = TheirTransformer.from_pretrained(published / "transformer")
    ours = AutoencoderDC.from_pretrained(published / "vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = SanaSprintPipeline.from_pretrained(published, transformer=theirs, vae=ours, scheduler=scheduler)
    assert pipe.transformer is theirs
    assert pipe.vae is ours
    assert pipe.scheduler is scheduler


def test_components_passed_as_none_are_left_out(published):
    pipe = SanaSprintPipeline.from_pretrained(published, text_encoder=None, tokenizer=None)
    assert pipe.text_encoder is None
    assert type(pipe.transformer) is SanaTransformer2DModel


def test_a_component_of_another_kind_is_refused_as_in_diffusers(published):
    with pytest.raises(ValueError, match="should be"):
        SanaSprintPipeline.from_pretrained(published, transformer=TheirScheduler())


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_asked_for_and_nothing_is_logged(published, argument, caplog, recwarn):
    with caplog.at_level(logging.WARNING):
        pipe = SanaSprintPipeline.from_pretrained(published, **{argument: torch.bfloat16})
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(one.message) for one in recwarn if "torch_dtype" in str(one.message)] == []


def test_each_component_may_have_its_own_dtype(published):
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    pipe = SanaSprintPipeline.from_pretrained(published, dtype=dtypes)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)


def test_both_spellings_of_the_dtype_at_once_are_refused_as_in_diffusers(published):
    with pytest.raises(ValueError, match="both"):
        SanaSprintPipeline.from_pretrained(published, dtype=torch.bfloat16, torch_dtype=torch.float16)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_a_device_map_places_our_classes(published, device_map):
    pipe = SanaSprintPipeline.from_pretrained(published, device_map=device_map)
    assert classes_of(pipe) == OURS
    assert draw(pipe).isfinite().all()


def test_a_variant_is_saved_and_loaded(tmp_path, tiny_pipeline_parts):
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    with pytest.raises(OSError, match="no file named"):
        SanaSprintPipeline.from_pretrained(tmp_path)
    pipe = SanaSprintPipeline.from_pretrained(tmp_path, variant="fp16")
    assert_close(draw(pipe), draw(SanaSprintPipeline(**tiny_pipeline_parts)), atol=LOADED, rtol=0)


def test_shards_are_saved_and_loaded(tmp_path, tiny_pipeline_parts):
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    pipe = SanaSprintPipeline.from_pretrained(tmp_path)
    assert_close(draw(pipe), draw(SanaSprintPipeline(**tiny_pipeline_parts)), atol=LOADED, rtol=0)


def test_a_component_exchanged_after_loading_is_saved_under_diffusers_name(published, tmp_path):
    pipe = SanaSprintPipeline.from_pretrained(
        published, transformer=TheirTransformer.from_pretrained(published / "transformer")
    )
    pipe.transformer = SanaTransformer2DModel.from_pretrained(published / "transformer")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SanaTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    again = SanaSprintPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match="model_index.json"):
        SanaSprintPipeline.from_pretrained(tmp_path)


# C1
def test_a_cast_of_our_models_does_not_warn_of_an_empty_list(published, caplog):
    pipe = SanaSprintPipeline.from_pretrained(published)
    with caplog.at_level(logging.WARNING):
        pipe.to(torch.bfloat16)
        pipe.transformer.to(dtype=torch.float32)
    assert [record.getMessage() for record in caplog.records] == []
