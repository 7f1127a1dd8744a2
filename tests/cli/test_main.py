"""The command as a user meets it: help, version, and errors of one line with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from sana_sprint import __version__
from sana_sprint.cli.main import main

SOURCE = Path(__file__).parents[2] / "src"


def exit_code(*arguments: str) -> int:
    """What the process would exit with."""
    try:
        return main(arguments)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["cache-latents", "--help"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["search-timesteps", "--help"],
        ["bench", "--help"],
        ["--version"],
        [],
    ],
)
def test_help_and_version_import_neither_torch_nor_diffusers(arguments):
    code = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from sana_sprint.cli.main import main
try:
    main({arguments!r})
finally:
    heavy = {{"torch", "diffusers", "transformers", "numpy", "PIL", "tqdm"}}
    print("imported:", heavy & {{name.split(".")[0] for name in sys.modules}} or "nothing")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("imported: nothing\n")


def test_a_picture_is_drawn_without_what_only_quantised_models_need(model_folder, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from sana_sprint.cli.main import main
code = main(["generate", "a", "--model", {model_folder!r}, "--output", {str(tmp_path)!r}])
heavy = {{"bitsandbytes", "torch._inductor.lowering", "sana_sprint.quantisation.layers"}}
print("imported:", heavy & set(sys.modules) or "nothing")
sys.exit(code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("imported: nothing\n")
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_the_command_alone_prints_help(capsys):
    assert exit_code() == 0
    assert "generate" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"sana-sprint {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["paint"], "'paint'"),
        (["generate"], "give a prompt"),
        (["generate", "a", "--steps", "0"], "got 0"),
        (["generate", "a", "--stepz", "1"], "--stepz"),
        (["generate", "a", "--step", "1"], "--step"),
        (["generate", "a", "--steps", "1", "--timesteps", "1,0"], "exclude each other"),
        (["generate", "--prompts", "missing.txt"], "missing.txt: No such file"),
        (["generate", "--like", "missing.png"], "missing.png: No such file"),
        (["generate", "a", "--output", "a.jpg"], "end in .png"),
        (["generate", "a", "--model", "./missing"], "no folder ./missing"),
        (["generate", "a", "--model", "."], "holds no model_index.json"),
    ],
)
def test_an_error_is_one_line_on_standard_error_and_exit_code_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sana-sprint: error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_comes_from(capsys):
    assert exit_code("generate", "--like", "missing.png", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
