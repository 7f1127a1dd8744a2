"""`sana-sprint convert`, and the scripts with diffusers' argument names: options become a conversion."""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from sana_sprint import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel
from sana_sprint.cli.convert import add_arguments, choose_job, setting, settings_of
from sana_sprint.cli.main import main

SCRIPTS = Path(__file__).parents[2] / "scripts"

# Of the tiny transformer, whose heads are narrower than any published one's.
SETTINGS = ["--set", "attention_head_dim=8", "--set", "cross_attention_head_dim=8", "--set", "sample_size=8"]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(arguments)


def exit_code(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0


@pytest.fixture
def checkpoint(model_folder, tmp_path) -> Path:
    """The tiny transformer in the original layout."""
    path = tmp_path / "in" / "Sana_Sprint_1024px.pth"
    path.parent.mkdir()
    assert exit_code("convert", model_folder, path, "--to", "original") == 0
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=0.001", 0.001), ("a=null", None), ("a=true", True), ("a=rms", "rms"), ("a=", "")],
)
def test_settings_are_json_or_text(text, value):
    assert setting(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=3", "a b=3", "_class_name=A"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
        setting(text)


def test_the_choices_are_those_of_the_library():
    """Written out for the sake of --help, which must not import it."""
    from sana_sprint.checkpoints import assembly, convert, rules, transformer_config
    from sana_sprint.cli import convert as command

    assert set(command.LAYOUTS) == set(rules.LAYOUTS)
    assert set(command.DTYPES) == convert.DTYPES.keys()
    assert set(command.KINDS) == set(get_args(rules.Kind))
    assert set(command.SCHEDULERS) == set(get_args(assembly.SchedulerName))
    assert command.PIXELS_PER_CELL == transformer_config.PIXELS_PER_CELL


def test_an_image_size_is_a_sample_size_and_a_setting_wins_over_it():
    assert settings_of(parse("a", "b", "--image-size", "512")) == {"sample_size": 16}
    assert settings_of(parse("a", "b", "--image-size", "512", "--set", "sample_size=8")) == {"sample_size": 8}


def test_options_become_a_conversion(checkpoint):
    job = choose_job(
        parse(
            str(checkpoint),
            "out",
            "--dtype",
            "bf16",
            "--shard-size",
            "1MB",
            "--ema",
            "--kind",
            "transformer",
            "--force",
        )
    )
    assert (job.source, job.output, job.to, job.dtype) == (checkpoint, Path("out"), "diffusers", torch.bfloat16)
    assert (job.shard_bytes, job.ema, job.kind, job.force) == (10**6, True, "transformer", True)
    plain = choose_job(parse(str(checkpoint), "out.pth", "--to", "original"))
    assert (plain.to, plain.dtype, plain.shard_bytes, plain.force) == ("original", None, 5 * 10**9, False)


def test_a_conversion_is_told_in_lines_with_every_guess(checkpoint, tmp_path, capsys):
    capsys.readouterr()
    assert exit_code("convert", checkpoint, tmp_path / "folder", *SETTINGS[:4]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first, second, *rest = printed.out.splitlines()
    assert "parameters, original -> diffusers" in first
    assert second.startswith(f"wrote {tmp_path / 'folder'}: ")
    assert rest == []  # the file's name says for how many pixels it was trained
    assert SanaTransformer2DModel.from_pretrained(tmp_path / "folder").config.sample_size == 32

    renamed = checkpoint.rename(checkpoint.with_name("model.pth"))
    assert exit_code("convert", renamed, tmp_path / "guessed", *SETTINGS[:4]) == 0
    assert "note: trained for 1024 pixels" in capsys.readouterr().out
    assert exit_code("convert", renamed, tmp_path / "told", *SETTINGS) == 0
    assert "note:" not in capsys.readouterr().out


def test_there_and_back_on_the_command_line_is_the_identity(checkpoint, tmp_path):
    assert exit_code("convert", checkpoint, tmp_path / "folder", *SETTINGS) == 0
    assert exit_code("convert", tmp_path / "folder", tmp_path / "back.pth", "--to", "original") == 0
    found, wanted = (torch.load(path, weights_only=True)["state_dict"] for path in (tmp_path / "back.pth", checkpoint))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["./missing.pth", "out"], "no file or folder ./missing.pth"),
        (["empty.pth", "out"], "empty.pth is empty"),
        (["text.pth", "out"], "text.pth is no checkpoint"),
        (["text.pth", "out.pth"], "must not end in .pth"),
        (["nobody/nothing/there.pth", "out.pth"], "must not end in .pth"),
        (
            ["nobody/nothing/there.pth", "empty.pth", "--to", "original"],
            "empty.pth exists already; --force replaces it",
        ),
        (["text.pth", "out", "--vae", "text.pth"], "not asked for"),
        (["text.pth", "out", "--dtype", "int4"], "int4"),
        (["text.pth", "out", "--shard-size", "big"], "'big'"),
        (["text.pth"], "OUTPUT"),
    ],
)
def test_an_error_is_one_line_exit_code_2_and_no_output(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.pth").write_bytes(b"")
    Path("text.pth").write_text("Not a checkpoint, but a letter about one.")
    assert exit_code("convert", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sana-sprint: error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert names_in(tmp_path) == ["empty.pth", "text.pth"]


PROGRAM = """
import os, signal, sys
from tqdm import tqdm
from sana_sprint.cli.main import main
tqdm.update = lambda bar, count: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_is_terminated_clears_away_what_it_wrote(checkpoint, tmp_path):
    """The signal comes when the progress bar is told of the first tensor."""
    arguments = ["convert", checkpoint, tmp_path / "a" / "out", *SETTINGS]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent / "src")}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert names_in(tmp_path) == ["in"]


# The scripts


def run_script(monkeypatch, name: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    assert isinstance(leave.value.code, int)
    return leave.value.code


def test_the_sana_script_takes_diffusers_arguments(monkeypatch, checkpoint, tmp_path, capsys):
    """The tiny model is no published type: only the types' contradiction is seen."""
    code = run_script(
        monkeypatch,
        "convert_sana_to_diffusers.py",
        *("--orig_ckpt_path", checkpoint, "--image_size", "512", "--model_type", "SanaSprint_1600M_P1_D20"),
        *("--scheduler_type", "scm", "--dump_path", tmp_path / "out", "--dtype", "bf16"),
    )
    assert code == 2
    assert "Sana_Sprint_1024px.pth" in capsys.readouterr().err
    assert names_in(tmp_path) == ["in"]


@pytest.fixture
def wide(tmp_path) -> Path:
    """A transformer with heads as wide as published ones', in the original layout."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "num_layers": 1}
    sizes = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 64, "caption_channels": 32, "sample_size": 8}
    model = SanaTransformer2DModel(**config, **sizes, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    model.save_pretrained(tmp_path / "wide" / "transformer")
    assert exit_code("convert", tmp_path / "wide", tmp_path / "wide" / "model.pth", "--to", "original") == 0
    return tmp_path / "wide" / "model.pth"


def test_the_sana_script_writes_the_transformer_below_the_dump_path(monkeypatch, wide, tmp_path):
    arguments = ("--orig_ckpt_path", wide, "--image_size", 512, "--dump_path", tmp_path / "out", "--dtype", "fp16")
    assert run_script(monkeypatch, "convert_sana_to_diffusers.py", *arguments) == 0
    model = SanaTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer", torch_dtype="auto")
    assert model.config.sample_size == 16
    assert run_script(monkeypatch, "convert_sana_to_diffusers.py", *arguments) == 2
    assert run_script(monkeypatch, "convert_sana_to_diffusers.py", *arguments, "--force") == 0


def test_the_sana_script_writes_a_whole_pipeline(monkeypatch, wide, model_folder, tmp_path):
    parts = ("--vae", model_folder, "--text_encoder", model_folder)
    arguments = ("--orig_ckpt_path", wide, "--dump_path", tmp_path / "out", "--save_full_pipeline", *parts)
    assert run_script(monkeypatch, "convert_sana_to_diffusers.py", *arguments, "--scheduler_type", "scm") == 0
    pipe = SanaSprintPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler).__name__ == "SCMScheduler"
    assert pipe.transformer.dtype == torch.float32  # as diffusers' script has it


@pytest.fixture
def deep(tmp_path) -> Path:
    """An autoencoder of the f64 kind with as many latent channels as the published one, but narrow."""
    layers = (0, 1, 1, 1, 1, 1, 1)
    model = AutoencoderDC(
        latent_channels=128,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8, 8, 8, 8, 8, 128),
        decoder_block_out_channels=(4, 8, 8, 8, 8, 8, 128),
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 7,
        decoder_qkv_multiscales=((),) * 7,
    )
    model.save_pretrained(tmp_path / "deep")
    assert exit_code("convert", tmp_path / "deep", tmp_path / "deep" / "model.safetensors", "--to", "original") == 0
    return tmp_path / "deep" / "model.safetensors"


@pytest.mark.parametrize(("training", "factor"), [("in", 0.2889), ("mix", 0.4538)])
def test_the_dcae_script_takes_diffusers_arguments(monkeypatch, deep, tmp_path, training, factor):
    name = f"dc-ae-f64c128-{training}-1.0"
    arguments = ("--config_name", name, "--ae_ckpt_path", deep, "--output_path", tmp_path / "out", "--dtype", "bf16")
    assert run_script(monkeypatch, "convert_dcae_to_diffusers.py", *arguments) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scaling_factor"] == factor


@pytest.mark.parametrize("name", ["dc-ae-f32c32-sana-1.1", "dc-ae-f32c32-in-1.0", "dc-ae-f128c512-mix-1.0"])
def test_a_name_that_the_tensors_contradict_is_refused_by_the_dcae_script(monkeypatch, deep, tmp_path, capsys, name):
    arguments = ("--config_name", name, "--ae_ckpt_path", deep, "--output_path", tmp_path / "out")
    assert run_script(monkeypatch, "convert_dcae_to_diffusers.py", *arguments) == 2
    assert "is no whole DC-AE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_dcae_script_names_the_repository_it_would_fetch(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, "convert_dcae_to_diffusers.py", "--output_path", "out") == 2
    assert "mit-han-lab/dc-ae-f32c32-sana-1.0/model.safetensors" in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_the_controlnet_script_wants_a_controlnet(monkeypatch, wide, tmp_path, capsys):
    arguments = ("--orig_ckpt_path", wide, "--image_size", 1024, "--dump_path", tmp_path / "out", "--dtype", "bf16")
    assert run_script(monkeypatch, "convert_sana_controlnet_to_diffusers.py", *arguments) == 2
    assert "holds no controlnet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
