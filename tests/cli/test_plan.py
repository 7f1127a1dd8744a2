"""`sana-sprint plan`: the table, the choice, and the line of code, which works."""

import json
from pathlib import Path

import pytest
import torch

from sana_sprint import SanaControlNetModel, SanaTransformer2DModel
from sana_sprint.cli.main import main


@pytest.fixture(scope="module")
def control_folder(model_folder, tmp_path_factory) -> str:
    """A ControlNet for the tiny model."""
    transformer = SanaTransformer2DModel.from_pretrained(model_folder, subfolder="transformer")
    folder: Path = tmp_path_factory.mktemp("models") / "control"
    SanaControlNetModel.from_transformer(transformer, num_layers=1).save_pretrained(folder)
    return str(folder)


def lines_of(capsys, *arguments: str) -> list[str]:
    assert main(["plan", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_the_table_has_a_line_for_every_arrangement_and_ends_with_the_choice(capsys):
    header, *rows, _, choice, _, code = lines_of(capsys, "--model", "embedded", "--vram", "8GiB")
    assert header.split() == ["arrangement", "encode", "denoise", "decode", "most", "machine", "fits"]
    assert len(rows) == 10
    assert all(row.endswith("yes") for row in rows)
    assert choice.startswith("16-bit, resident: at most ")
    assert code == 'pipe = sana_sprint.load_pipeline(sana_sprint.embedded_checkpoint(), memory="8GiB")'


def test_the_line_of_code_loads_what_was_chosen(model_folder, capsys):
    arguments = ("--model", model_folder, "--cpu", "--ram", "1.5GB", "--size", "128x64", "--batch", "2")
    code = lines_of(capsys, *arguments)[-1]
    assert 'memory="1.5GB", device="cpu", width=128, height=64, batch_size=2)' in code
    names: dict = {}
    exec(f"import sana_sprint\n{code}", names)
    assert names["pipe"].memory_plan.budget.host == 1_500_000_000


@pytest.mark.parametrize("option", [["--init-image"], ["--controlnet", "2"]])
def test_encoding_a_picture_has_a_column_where_it_is_asked_for(option, capsys):
    header, *rows, _, choice, _, code = lines_of(capsys, "--model", "embedded", "--vram", "8GiB", *option)
    assert header.split()[:4] == ["arrangement", "encode", "picture", "encode"]
    assert len(rows) == 10
    assert choice.startswith("16-bit, resident: at most ")
    kind = "SanaSprintImg2ImgPipeline" if option == ["--init-image"] else "SanaSprintControlNetPipeline"
    assert f', memory="8GiB", pipeline_class=sana_sprint.{kind}' in code
    assert code.endswith('controlnet="FOLDER")') is (option != ["--init-image"])


@pytest.mark.parametrize("option", [[], ["--init-image"]])
def test_the_line_of_code_loads_the_controlnet_that_was_planned_for(option, model_folder, control_folder, capsys):
    arguments = ("--model", model_folder, "--cpu", "--ram", "1.5GB", "--controlnet", control_folder, *option)
    *_, choice, _, code = lines_of(capsys, *arguments)
    names: dict = {}
    exec(f"import sana_sprint\n{code}", names)
    pipe = names["pipe"]
    assert str(pipe.memory_plan) == choice
    assert type(pipe.controlnet) is SanaControlNetModel
    assert type(pipe).__name__ == f"SanaSprintControlNet{'Img2Img' if option else ''}Pipeline"


def test_a_controlnet_by_its_number_of_blocks_takes_as_much_as_its_folder(model_folder, control_folder, capsys):
    arguments = ("--model", model_folder, "--vram", "8GiB", "--json")
    by_number, by_folder, without = (
        lines_of(capsys, *arguments, *option)
        for option in (["--controlnet", "1"], ["--controlnet", control_folder], [])
    )
    assert by_number == by_folder != without


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is planned for first")
def test_a_machine_without_a_gpu_is_planned_for_as_such(capsys):
    code = lines_of(capsys, "--model", "embedded", "--ram", "2GiB")[-1]
    assert code == 'pipe = sana_sprint.load_pipeline(sana_sprint.embedded_checkpoint(), memory="2GiB", device="cpu")'


def test_published_models_are_planned_without_a_download(capsys):
    *_, code = lines_of(capsys, "--vram", "16GB", "--ram", "32GB")
    name = "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"
    assert code == f'pipe = sana_sprint.load_pipeline("{name}", memory="16GB", ram="32GB")'


def test_json_is_one_document_in_bytes(capsys):
    document = json.loads("\n".join(lines_of(capsys, "--model", "embedded", "--cpu", "--ram", "2GiB", "--json")))
    first = document["plans"][document["chosen"]]
    assert (first["bits"], first["placement"], first["tile"], first["fits"]) == (16, "resident", None, True)
    assert first["peak"] > max(stage["weights"] + stage["work"] for stage in first["stages"].values())
    assert (document["width"], document["height"]) == (64, 64)


def test_where_nothing_fits_the_table_is_shown_and_the_command_fails(capsys):
    assert main(["plan", "--model", "embedded", "--cpu", "--ram", "10MB"]) == 2
    captured = capsys.readouterr()
    assert captured.out.count(" no\n") == 3
    assert captured.err.startswith("sana-sprint: error: no arrangement fits 10.0 MB")
    assert captured.err.count("\n") == 1


def test_where_nothing_fits_json_is_printed_and_the_command_fails(capsys):
    assert main(["plan", "--model", "embedded", "--cpu", "--ram", "10MB", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["chosen"] is None
    assert captured.err.startswith("sana-sprint: error: no arrangement fits 10.0 MB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "lots"], "wanted a size such as 8GiB"),
        (["--vram", "8GiB", "--cpu"], "--cpu and --vram exclude each other"),
        (["--model", "nowhere"], "nowhere"),
        (["--controlnet", "nowhere"], "nowhere"),
        (["--controlnet", "20"], "num_layers must be from 1 to 19 for a transformer of 20 blocks, got 20"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    try:
        code = main(["plan", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
