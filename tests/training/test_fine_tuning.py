"""A LoRA of a tiny Sprint pipeline: what is written, what reads it, how it goes on, and what is refused before work."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import LOOP, OPTIMISER

from sana_sprint import SanaSprintPipeline, SanaTransformer2DModel
from sana_sprint.training.fine_tuning import train_lora
from sana_sprint.training.lora import LoraSettings
from sana_sprint.training.origin import Origin
from sana_sprint.training.recipes import find_recipe

CPU = torch.device("cpu")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def sprint_folder(tiny_pipeline_parts, tmp_path_factory):
    """A pipeline of a tiny Sprint model, whose encoders are those that made the cache."""
    folder = tmp_path_factory.mktemp("sprint") / "pipeline"
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(sprint_folder, cache_folder):
    """The published recipe with tiny numbers."""
    return tiny_recipe(sprint_folder, cache_folder)


def tiny_recipe(model, data):
    settings = LoraSettings(optimiser=OPTIMISER, rank=2)
    changes = {"model_dtype": "fp32", "loop": LOOP, "lora": settings}
    return replace(find_recipe("lora"), model=str(model), data=data, prior=data, **changes)


def velocity(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return transformer(
            torch.randn(2, 4, 8, 8, generator=generator),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
            timestep=torch.tensor([0.3, 0.8]),
            guidance=torch.tensor([0.45, 0.45]),
        ).sample


@pytest.fixture(scope="module")
def trained(sprint_folder, cache_folder, tmp_path_factory):
    """The folder of a run, and what its last network predicted."""
    output = tmp_path_factory.mktemp("lora")
    seen = []
    recipe = tiny_recipe(sprint_folder, cache_folder)
    train_lora(
        recipe, Origin.find(recipe.model), output, CPU, lambda network, step: seen.append((velocity(network), step))
    )
    return output, seen


@pytest.mark.parametrize("kind", [SanaSprintPipeline, diffusers.SanaSprintPipeline])
def test_the_folder_loads_in_a_pipeline_whose_network_is_then_the_trained_one(trained, sprint_folder, kind):
    output, ((expected, step),) = trained
    assert step == LOOP.steps
    pipe = kind.from_pretrained(sprint_folder, torch_dtype=torch.float32)
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(output / "lora")
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=1e-5, rtol=1e-5)  # float32
    assert (expected - plain).abs().max() > 0.01
    assert type(pipe.transformer).__module__.startswith(kind.__module__.split(".")[0])


def test_the_file_holds_the_adapters_alone_in_float32_and_how_they_were_made_lies_beside(trained):
    folder = trained[0] / "lora"
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, "training.json"]
    weights = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(name.startswith("transformer.transformer_blocks.") and ".lora_" in name for name in weights)
    assert all(tensor.any() for tensor in weights.values())
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"]["lora"]["rank"] == 2
    assert record["losses"]["adapters"]["step"] == [1, 2]
    assert {"loss", "consistency", "preservation", "distance"} <= record["losses"]["adapters"].keys()


def test_the_states_of_a_run_hold_no_weight_that_is_frozen(trained):
    state = torch.load(trained[0] / "run" / "state-000002.pt", weights_only=True)
    sizes = {kind: sum(value.numel() for value in state[kind].values()) for kind in ("average", "network")}
    written = sum(value.numel() for value in load_file(trained[0] / "lora" / WEIGHTS).values())
    assert sizes["average"] == written
    assert all("lora_" in name or name.startswith("adapters.") for name in state["network"])


def test_a_run_that_stopped_ends_with_the_adapters_of_one_that_did_not(trained, recipe, tmp_path):
    train_lora(recipe, Origin.find(recipe.model), tmp_path, CPU)
    (tmp_path / "run" / "state-000002.pt").unlink()  # as if it had been killed after the first step
    train_lora(recipe, Origin.find(recipe.model), tmp_path, CPU)
    before, after = (load_file(folder / "lora" / WEIGHTS) for folder in (trained[0], tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_run_is_not_gone_on_with_adapters_of_another_kind(trained, recipe):
    for change in ({"lora": replace(recipe.lora, rank=3)}, {"prior": None}):
        other = replace(recipe, **change)
        with pytest.raises(ValueError, match="belongs to a run with other settings"):
            train_lora(other, Origin.find(other.model), trained[0], CPU)


def test_the_result_draws_what_the_base_does_not(trained, sprint_folder):
    def drawn(pipe):
        pipe.set_progress_bar_config(disable=True)
        options = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "np"}
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    pipe = SanaSprintPipeline.from_pretrained(sprint_folder, torch_dtype=torch.float32)
    plain = drawn(pipe)
    pipe.load_lora_weights(trained[0] / "lora")
    assert not np.allclose(drawn(pipe), plain, atol=1e-3)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(drawn(pipe), plain)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"guidance_embeds": False}, "not one of SANA-Sprint"),
        ({"qk_norm": None}, "not one of SANA-Sprint"),
        ({"caption_channels": 16}, "reads text features of width 16"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(config, message, recipe, tmp_path):
    given = {**Origin.find(recipe.model).config(), **config}
    SanaTransformer2DModel.from_config(given).save_pretrained(tmp_path / "other")
    other = replace(recipe, model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=message):
        train_lora(other, Origin.find(other.model), tmp_path / "output", CPU)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "there is no data"),
        ({"rank": 2, "targets": ("to_x",)}, "has no layers to_x"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(changes, message, recipe, tmp_path):
    settings = {name: changes.pop(name) for name in ("rank", "targets") if name in changes}
    asked = replace(recipe, lora=replace(recipe.lora, **settings), **changes)
    with pytest.raises(ValueError, match=message):
        train_lora(asked, Origin.find(asked.model), tmp_path / "output", CPU)
    assert not (tmp_path / "output").exists()


def test_a_folder_that_is_no_cache_is_refused_as_data_and_as_prior(recipe, tmp_path):
    for name in ("data", "prior"):
        asked = replace(recipe, **{name: tmp_path})
        with pytest.raises(ValueError, match="cache"):
            train_lora(asked, Origin.find(asked.model), tmp_path / "output", CPU)
    assert not (tmp_path / "output").exists()


def test_settings_that_exclude_each_other_are_refused(recipe):
    with pytest.raises(ValueError, match="model_dtype bf16 needs loop.precision bf16"):
        replace(recipe, model_dtype="bf16")
    with pytest.raises(ValueError, match="a prior has no effect"):
        replace(recipe, lora=replace(recipe.lora, preservation_weight=0.0))
