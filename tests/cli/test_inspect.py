"""`sana-sprint inspect`: what is printed of a checkpoint, whole or not."""

import json
from pathlib import Path

import pytest
import torch

from sana_sprint.cli.main import main


@pytest.fixture
def checkpoint(model_folder, tmp_path, capsys) -> Path:
    """The tiny transformer in the original layout."""
    path = tmp_path / "model.pth"
    assert main(["convert", model_folder, str(path), "--to", "original"]) == 0
    capsys.readouterr()
    return path


HEADS = ["--set", "attention_head_dim=8", "--set", "cross_attention_head_dim=8"]


def test_a_whole_checkpoint_is_told_in_lines(checkpoint, capsys):
    assert main(["inspect", str(checkpoint), *HEADS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(checkpoint)
    assert "transformer in the original layout" in lines[1]
    assert "tensors in float32" in lines[2]
    assert "note: trained for 1024 pixels" in lines[4]
    assert lines[-1] == "  complete: nothing missing, unexpected or mis-shaped"


def test_every_fault_has_a_line(checkpoint, capsys):
    tensors = torch.load(checkpoint, weights_only=True)["state_dict"]
    del tensors["blocks.0.attn.proj.bias"]
    tensors["blocks.0.attn.proj.gamma"] = torch.zeros(3)
    tensors["x_embedder.proj.bias"] = torch.zeros(3)
    torch.save({"state_dict": tensors}, checkpoint)
    assert main(["inspect", str(checkpoint), *HEADS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "  missing: blocks.0.attn.proj.bias",
        "  unexpected: blocks.0.attn.proj.gamma",
        "  mis-shaped: x_embedder.proj.bias is 3, wanted 16",
    ]


def test_a_pipelines_folder_is_told_model_by_model(model_folder, capsys):
    assert main(["inspect", model_folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        str(Path(model_folder) / "transformer"),
        str(Path(model_folder) / "vae"),
    ]


def test_of_a_pipeline_settings_are_those_of_the_models_that_have_them(model_folder, capsys):
    assert (
        main(["inspect", model_folder, "--json", "--set", "timestep_scale=0.001", "--set", "scaling_factor=0.5"]) == 0
    )
    transformer, vae = json.loads(capsys.readouterr().out)
    assert (transformer["config"]["timestep_scale"], vae["config"]["scaling_factor"]) == (0.001, 0.5)
    assert main(["inspect", model_folder, "--set", "colour=1"]) == 2
    assert "holds nothing with such a setting: colour" in capsys.readouterr().err


def test_json_is_one_document(model_folder, capsys):
    assert main(["inspect", model_folder, "--json"]) == 0
    transformer, vae = json.loads(capsys.readouterr().out)
    assert (transformer["kind"], vae["kind"]) == ("transformer", "autoencoder")
    assert transformer["is_exact"] is True
    assert transformer["missing"] == []


def test_what_is_no_checkpoint_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "model.pth").write_text("a letter")
    assert main(["inspect", str(tmp_path / "model.pth")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "model.pth is no checkpoint" in printed.err
