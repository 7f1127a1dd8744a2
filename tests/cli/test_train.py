"""`sana-sprint train`: a recipe, its settings and its stages, chosen, shown and run."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_distillation import CAPTIONS, LOOP, save_cache, save_teacher

from sana_sprint import SanaControlNetModel, SanaSprintPipeline, SanaTransformer2DModel
from sana_sprint.assets import embedded_checkpoint
from sana_sprint.cli.dry_run import starting_config
from sana_sprint.cli.main import main
from sana_sprint.cli.progress_pictures import ProgressPictures
from sana_sprint.training.recipes import find_recipe

# What makes the published recipe a tiny one.
TINY = [
    f"loop.steps={LOOP.steps}",
    f"loop.batch_size={LOOP.batch_size}",
    "loop.accumulation=1",
    "loop.precision=fp32",
    f"prompts={CAPTIONS[:2]!r}",
]
TINY_SPRINT = [
    *TINY,
    "teacher_dtype=fp32",
    "distillation.head_blocks=0,1",
    "distillation.student.learning_rate=0.01",
    "distillation.student.warmup_steps=1",
]


@pytest.fixture(scope="session")
def teacher(tiny_pipeline_parts, tmp_path_factory):
    """A pipeline folder whose flow model can be distilled."""
    return save_teacher(tiny_pipeline_parts, tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="session")
def cache(teacher, tmp_path_factory):
    """Latents that it can be trained on."""
    return save_cache(teacher, tmp_path_factory.mktemp("data"))


def test_a_stage_without_its_predecessors_result_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["train", "shapes", "--trial", "--stage", "assemble", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sana-sprint: error: stage 'several_steps' has left no result")
    assert err.count("\n") == 1


def test_a_stage_leaves_its_result_in_the_folder_asked_for(tmp_path, capsys):
    options = ["--stage", "autoencoder", "--output", str(tmp_path / "run"), "--set", "num_pictures=32"]
    assert main(["train", "shapes", "--trial", *options]) == 0
    assert capsys.readouterr().out == f"wrote autoencoder below {tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "autoencoder" / "vae" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "run" / "pool").glob("*.npy")] == ["pictures-32-64px-seed1.npy"]


@pytest.mark.parametrize("arguments", [["train"], ["train", "cats"], ["train", "shapes", "--stage", "paint"]])
def test_what_is_no_recipe_and_no_stage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_no_checkpoint_is_no_start(tmp_path, capsys):
    assert main(["train", "shapes", "--trial", "--start-from", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err == f"sana-sprint: error: {tmp_path} is no pipeline folder: it holds no model_index.json\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "--set", "flow.loop.stesp=1"], "there is no setting 'flow.loop.stesp'; the nearest is"),
        (["shapes", "--set", "flow.loop.steps=1", "pool_seed=x"], "pool_seed must be a whole number, got 'x'"),
        (["sprint_0.6b_1024", "--trial"], "--trial is for the recipes shapes and shapes_control, got"),
        (["teacher_0.6b_1024", "--stage", "flow"], "--stage is for the recipe shapes, got teacher_0.6b_1024"),
    ],
)
def test_settings_and_options_that_a_recipe_does_not_have_are_refused(arguments, message, capsys):
    assert main(["train", *arguments, "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sana-sprint: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("recipe", ["shapes", "shapes-control", "teacher-0.6b-1024"])
def test_a_dry_run_shows_settings_that_it_takes_back_and_leaves_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed = {"shapes": "flow.loop.seed", "shapes-control": "control_loop.seed"}.get(recipe, "loop.seed")
    assert main(["train", recipe, "--dry-run", "--set", f"{seed}=77"]) == 0
    first = capsys.readouterr().out
    settings, _, needs = first.partition("\n\n")
    assert f"{seed} = 77" in settings.splitlines()
    assert "estimated" in needs
    assert main(["train", recipe, "--dry-run", "--set", *settings.splitlines()]) == 0
    assert capsys.readouterr().out == first
    assert not any(tmp_path.iterdir())


def test_a_dry_run_counts_the_teacher_that_is_there_and_else_the_published_one(teacher, capsys):
    assert main(["train", "sprint_0.6b_1024", "--dry-run", "--set", f"teacher={teacher}", *TINY_SPRINT]) == 0
    out = capsys.readouterr().out
    assert f"with the networks of {teacher}:" in out
    assert main(["train", "sprint_0.6b_1024", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "teacher_diffusers is no folder here" in out
    (student,) = (line.split() for line in out.splitlines() if line.startswith("student "))
    assert student == ["student", "593,501,216", "2.37", "GB", "2.37", "GB", "4.75", "GB", "2.37", "GB"]


def test_a_sprint_recipe_trains_draws_on_the_way_and_leaves_a_pipeline(teacher, cache, tmp_path, capsys):
    options = ["--set", f"teacher={teacher}", f"data={cache}", *TINY_SPRINT, "loop.validate_every=1"]
    assert main(["train", "sprint_0.6b_1024", *options, "--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"wrote {tmp_path / 'checkpoint'}"
    assert printed.err == ""
    sheets = [np.asarray(Image.open(tmp_path / "pictures" / f"step-{step:06d}.png")) for step in (1, 2)]
    assert not np.array_equal(*sheets)
    picture = ["--output", str(tmp_path / "picture.png"), "--device", "cpu"]
    assert main(["generate", "a red circle", "--model", str(tmp_path / "checkpoint"), *picture]) == 0
    assert Image.open(tmp_path / "picture.png").size == (64, 64)


def test_a_teacher_recipe_trains_and_draws_on_the_way(teacher, cache, tmp_path, capsys):
    options = ["--set", f"start={teacher}", f"data={cache}", *TINY]
    assert main(["train", "teacher_0.6b_1024", *options, "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'checkpoint'}"
    assert np.asarray(Image.open(tmp_path / "pictures" / "step-000002.png")).std() > 0


def test_a_trial_of_the_shapes_control_net_runs_on_the_embedded_checkpoint(tmp_path, capsys):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    teacher = embedded_checkpoint() / "transformer"
    options = ["--trial", "--set", f"teacher={teacher}", "student=embedded", "num_pictures=16"]
    assert main(["train", "shapes_control", *options, "--output", str(tmp_path)]) == 0
    folder = tmp_path / "controlnet"
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {folder}, a ControlNet for embedded"
    assert SanaControlNetModel.from_pretrained(folder).config.num_layers == 2


def test_a_control_recipe_without_drawings_says_how_to_make_them(teacher, cache, tmp_path, capsys):
    options = ["--set", f"teacher={teacher}", f"data={cache}", "--output", str(tmp_path), "--device", "cpu"]
    assert main(["train", "control_1.6b_1024", *options]) == 2
    assert "make it with sana-sprint cache-latents --control edges" in capsys.readouterr().err


def test_a_transformer_alone_is_distilled_without_pictures_and_that_is_said_once(teacher, cache, tmp_path, capsys):
    options = ["--set", f"teacher={teacher / 'transformer'}", f"data={cache}", *TINY_SPRINT, "loop.steps=1"]
    assert main(["train", "sprint_0.6b_1024", *options, "--output", str(tmp_path), "--device", "cpu"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("sana-sprint: note: no pictures on the way")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "run"]


def test_without_prompts_nothing_is_drawn_on_the_way(teacher, cache, tmp_path, capsys):
    options = ["--set", f"teacher={teacher}", f"data={cache}", *TINY_SPRINT, "loop.steps=1", "prompts="]
    assert main(["train", "sprint_0.6b_1024", *options, "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "run"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_average_on_the_cpu_is_drawn_with_on_the_gpu_and_put_back(sprint, tmp_path):
    network = SanaTransformer2DModel.from_pretrained(sprint / "transformer")
    ProgressPictures(sprint, ["a red circle"], tmp_path, torch.device("cuda"), has_guidance=True)(network, 1)
    assert network.device.type == "cpu"
    assert (tmp_path / "pictures" / "step-000001.png").is_file()


def test_a_recipe_without_data_says_how_to_give_it(teacher, tmp_path, capsys):
    options = ["--set", f"teacher={teacher}", "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", "sprint_0.6b_1024", *options]) == 2
    assert "there is no data: give --set data=FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def sprint(tiny_pipeline_parts, tmp_path_factory):
    """A pipeline folder whose model draws in few steps."""
    folder = tmp_path_factory.mktemp("sprint") / "pipeline"
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(folder)
    return folder


def test_a_lora_is_trained_draws_on_the_way_and_is_read_by_a_pipeline(sprint, cache, tmp_path, capsys):
    options = ["--set", f"model={sprint}", f"data={cache}", f"prior={cache}", *TINY, "model_dtype=fp32", "lora.rank=2"]
    assert main(["train", "lora", *options, "--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    folder = tmp_path / "lora"
    assert printed.out.splitlines()[-1] == f"wrote {folder}; load it with: pipe.load_lora_weights({str(folder)!r})"
    assert printed.err == ""
    assert np.asarray(Image.open(tmp_path / "pictures" / "step-000002.png")).std() > 0
    pipe = SanaSprintPipeline.from_pretrained(sprint)
    pipe.load_lora_weights(folder)
    assert pipe.get_active_adapters() == ["default_0"]


def test_a_dry_run_of_a_lora_takes_its_settings_back_and_counts_what_is_frozen_without_gradients(sprint, capsys):
    assert main(["train", "lora", "--dry-run", "--set", f"model={sprint}", "lora.rank=2", "loop.seed=77"]) == 0
    first = capsys.readouterr().out
    assert f"with the networks of {sprint}:" in first
    rows = [line.split() for line in first.splitlines() if line.startswith(("adapters ", "transformer "))]
    assert [row[0] for row in rows] == ["adapters", "transformer"]
    assert "-" not in rows[0]
    assert rows[1][-3:] == ["-", "-", "-"]
    settings, _, _ = first.partition("\n\n")
    assert "loop.seed = 77" in settings.splitlines()
    assert main(["train", "lora", "--dry-run", "--set", *settings.splitlines()]) == 0
    assert capsys.readouterr().out == first


def test_a_dry_run_of_a_lora_takes_the_published_model_as_it_is_where_there_is_none():
    config, source = starting_config(find_recipe("lora"))
    assert config["guidance_embeds"]
    assert "is no folder here" in source


def test_a_teacher_is_no_model_for_a_lora(teacher, cache, tmp_path, capsys):
    options = [
        "--set",
        f"model={teacher}",
        f"data={cache}",
        *TINY,
        "model_dtype=fp32",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(["train", "lora", *options, "--device", "cpu"]) == 2
    assert "the model is not one of SANA-Sprint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
