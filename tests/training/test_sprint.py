"""A tiny teacher, distilled and exported: what is written, what draws from it, and what is refused."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import LOOP, sprint_recipe

from sana_sprint import SanaSprintPipeline, SanaTransformer2DModel
from sana_sprint.training.datasets.cached import CachedLatents
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.distillation import Distillation
from sana_sprint.training.draws import Draws
from sana_sprint.training.origin import Origin, open_cache
from sana_sprint.training.sprint import CheckpointedDistillation, sprint_objective, train_sprint

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def distilled(teacher_folder, cache_folder, tmp_path_factory):
    """The folder of a run, and the networks and steps that its validation has seen."""
    output = tmp_path_factory.mktemp("sprint")
    seen = []
    recipe = sprint_recipe(teacher_folder, cache_folder)
    train_sprint(recipe, Origin.find(recipe.teacher), output, CPU, lambda network, step: seen.append((network, step)))
    return output, seen


def drawn(kind, folder):
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), height=64, width=64,
        use_resolution_binning=False, output_type="np",
    ).images  # fmt: skip


def test_the_exported_pipeline_draws_the_same_in_diffusers(distilled):
    checkpoint = distilled[0] / "checkpoint"
    ours = drawn(SanaSprintPipeline, checkpoint)
    theirs = drawn(diffusers.SanaSprintPipeline, checkpoint)
    assert ours.shape == (1, 64, 64, 3)
    assert ours.std() > 0
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # float32 through two steps and a decoder
    assert type(diffusers.SanaSprintPipeline.from_pretrained(checkpoint).scheduler) is diffusers.SCMScheduler


def test_the_export_is_the_student_alone_with_the_encoders_of_its_teacher(distilled, teacher_folder):
    checkpoint = distilled[0] / "checkpoint"
    student = load_file(checkpoint / "transformer" / WEIGHTS)
    assert student.keys() == SanaTransformer2DModel.from_pretrained(checkpoint / "transformer").state_dict().keys()
    assert {tensor.dtype for tensor in student.values()} == {torch.bfloat16}
    assert any("guidance_embedder" in name for name in student)
    for file in (f"vae/{WEIGHTS}", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (checkpoint / file).read_bytes() == (teacher_folder / file).read_bytes()
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    assert config["guidance_embeds"]
    assert "_name_or_path" not in config


def test_the_export_records_how_it_was_made(distilled):
    record = json.loads((distilled[0] / "checkpoint" / "training.json").read_text())
    assert record["recipe"]["loop"]["seed"] == LOOP.seed
    assert record["losses"]["distillation"]["step"] == [1, 2]
    assert record["versions"]["torch"] == torch.__version__


def test_the_validation_is_shown_the_average_after_the_last_step(distilled):
    ((network, step),) = distilled[1]
    assert step == LOOP.steps
    assert isinstance(network, SanaTransformer2DModel)


def test_a_run_that_stopped_ends_with_the_weights_of_one_that_did_not(
    distilled, teacher_folder, cache_folder, tmp_path
):
    recipe = sprint_recipe(teacher_folder, cache_folder)
    train_sprint(recipe, Origin.find(recipe.teacher), tmp_path, CPU)
    (tmp_path / "run" / "state-000002.pt").unlink()  # as if it had been killed after the first step
    train_sprint(recipe, Origin.find(recipe.teacher), tmp_path, CPU)
    before, after = (load_file(folder / "checkpoint" / "transformer" / WEIGHTS) for folder in (distilled[0], tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_run_is_not_gone_on_with_another_teacher_or_other_data(distilled, teacher_folder, cache_folder, tmp_path):
    recipe = sprint_recipe(teacher_folder, cache_folder)
    other = SanaTransformer2DModel.from_pretrained(teacher_folder / "transformer")
    torch.nn.init.normal_(other.proj_out.weight)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"belongs to a run with other settings or data \(teacher\)"):
        train_sprint(recipe, Origin.find(str(tmp_path / "teacher")), distilled[0], CPU)
    described = json.loads((cache_folder / "cache.json").read_text())
    shutil.copytree(cache_folder, tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text(json.dumps({**described, "source": "other pictures"}))
    with pytest.raises(ValueError, match=r"belongs to a run with other settings or data \(data\)"):
        train_sprint(replace(recipe, data=tmp_path / "cache"), Origin.find(recipe.teacher), distilled[0], CPU)


def test_a_run_goes_on_with_the_same_teacher_and_data_in_another_place(
    distilled, teacher_folder, cache_folder, tmp_path
):
    output, teacher, cache = (tmp_path / name for name in ("output", "teacher", "cache"))
    for source, copy in ((distilled[0], output), (teacher_folder, teacher), (cache_folder, cache)):
        shutil.copytree(source, copy)
    recipe = sprint_recipe(teacher, cache)
    shutil.rmtree(output / "checkpoint")
    checkpoint = train_sprint(recipe, Origin.find(recipe.teacher), output, CPU)
    before, after = (
        load_file(folder / "transformer" / WEIGHTS) for folder in (distilled[0] / "checkpoint", checkpoint)
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_examples_that_cannot_be_read_are_told_of_at_the_start(teacher_folder, cache_folder, tmp_path, caplog):
    cache = tmp_path / "cache"
    shutil.copytree(cache_folder, cache)
    (shard,) = cache.glob("*.tar")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    teacher = SanaTransformer2DModel.from_pretrained(teacher_folder / "transformer")
    source = open_cache(cache, CaptionChoice(), teacher)
    assert 0 < len(source) < len(CachedLatents(cache_folder))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"1 of what is in {cache} cannot be read, and is left out: {shard.name}")


def test_a_teacher_without_a_pipeline_gives_a_transformer_without_one(teacher_folder, cache_folder, tmp_path):
    recipe = sprint_recipe(teacher_folder / "transformer", cache_folder, loop=replace(LOOP, steps=1))
    checkpoint = train_sprint(recipe, Origin.find(recipe.teacher), tmp_path, CPU)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", WEIGHTS, "training.json"]
    assert SanaTransformer2DModel.from_pretrained(checkpoint).config.guidance_embeds


@pytest.fixture
def objectives(teacher_folder, cache_folder):
    """The same distillation, without and with blocks that are run again."""
    made = []
    for gradient_checkpointing in (False, True):
        recipe = sprint_recipe(teacher_folder, cache_folder, gradient_checkpointing=gradient_checkpointing)
        torch.manual_seed(0)
        teacher = Origin.in_folder(teacher_folder).load()
        made.append(sprint_objective(recipe, teacher, CachedLatents(cache_folder)).train())
    return made


def test_blocks_that_are_run_again_change_no_loss_and_no_gradient(objectives):
    plain, checkpointed = objectives
    assert type(plain) is Distillation
    assert type(checkpointed) is CheckpointedDistillation
    losses = [objective(Draws.of_step(0, 5, 3)) for objective in objectives]
    for each in losses:
        each["loss"].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0]["derivative_norm"] > 0
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in checkpointed.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # float32, in another order of sums


def test_a_teacher_in_bfloat16_leaves_its_student_in_float32_and_is_understood_under_autocast(
    teacher_folder, cache_folder
):
    recipe = sprint_recipe(teacher_folder, cache_folder, teacher_dtype="bf16", loop=replace(LOOP, precision="bf16"))
    exact = Origin.in_folder(teacher_folder).load()
    objective = sprint_objective(recipe, Origin.in_folder(teacher_folder).load(), CachedLatents(cache_folder)).train()
    assert {parameter.dtype for parameter in objective.teacher.parameters()} == {torch.bfloat16}
    weight = "transformer_blocks.0.ff.conv_inverted.weight"
    assert torch.equal(objective.student.state_dict()[weight], exact.state_dict()[weight])
    with torch.autocast("cpu", torch.bfloat16):
        objective(Draws.of_step(0, 5, 3))["loss"].backward()
    assert objective.student.proj_out.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"timestep_scale": 1.0}, "was trained with times from 0 to 1000"),
        ({"qk_norm": None}, "does not normalise queries and keys"),
    ],
)
def test_a_plain_flow_model_is_no_teacher(config, message, teacher_folder, cache_folder, tmp_path):
    given = {**Origin.in_folder(teacher_folder).config(), **config}
    SanaTransformer2DModel.from_config(given).save_pretrained(tmp_path / "plain")
    recipe = sprint_recipe(tmp_path / "plain", cache_folder)
    with pytest.raises(ValueError, match=message):
        train_sprint(recipe, Origin.find(recipe.teacher), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_dtype": "bf16"}, "teacher_dtype bf16 needs loop.precision bf16"),
        ({"compile": True}, "gradient_checkpointing and distillation.compile exclude each other"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes, message, tmp_path):
    recipe = sprint_recipe(tmp_path, tmp_path)
    if changes.pop("compile", False):
        changes["distillation"] = replace(recipe.distillation, compile=True)
    with pytest.raises(ValueError, match=message):
        replace(recipe, **changes)
