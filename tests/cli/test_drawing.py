"""`sana-sprint generate` with a real, tiny pipeline: what is drawn, stored, printed, and drawn again bit for bit."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_sprint.cli.main import main
from sana_sprint.cli.records import read_record

SOURCE = Path(__file__).parents[2] / "src"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files() -> set[str]:
    return set(os.listdir())


def test_pictures_are_named_for_prompt_and_seed_and_their_place_is_printed(generate):
    code, out, err = generate("A red circle!", "stars", "--seed", "3", "--num-images", "2")
    names = ["a-red-circle-3.png", "a-red-circle-4.png", "stars-3.png", "stars-4.png"]
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"wrote {name}" for name in names]
    assert files() == set(names)
    assert len({pixels(name).tobytes() for name in names}) == 4


def test_a_picture_is_the_same_alone_and_among_others(generate):
    generate("a", "b", "--num-images", "2", "--output", "many")
    generate("b", "--seed", "1", "--output", "one")
    assert (pixels("many/b-1.png") == pixels("one/b-1.png")).all()


def test_nothing_is_ever_overwritten(generate):
    generate("a", "a")
    first = Path("a-0.png").read_bytes()
    generate("a", "--size", "32x64")
    assert files() == {"a-0.png", "a-0-2.png", "a-0-3.png"}
    assert Path("a-0.png").read_bytes() == first
    assert Image.open("a-0-3.png").size == (32, 64)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--steps", "3", "--guidance", "1.5", "--size", "96x64"],
        ["--timesteps", "1.5707963,1.1,0.4,0"],
        ["--dtype", "bfloat16"],
        ["--grid", "--num-images", "3"],
    ],
    ids=" ".join,
)
def test_like_draws_a_picture_again_bit_for_bit(generate, options):
    generate("ein grüner Stern 星", "--seed", "11", "--output", "first.png", *options)
    code, out, err = generate("--like", "first.png", "--output", "again.png")
    assert (code, out, err) == (0, "wrote again.png\n", "")
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


def test_every_option_that_is_stored_changes_the_picture(generate):
    generate("a", "--output", "plain.png")
    for option, value in [("--steps", "1"), ("--guidance", "1"), ("--seed", "1"), ("--timesteps", "1.5,0.9,0")]:
        generate("--like", "plain.png", option, value, "--output", "other.png")
        assert (pixels("plain.png") != pixels("other.png")).any(), option
        Path("other.png").unlink()


def test_like_loads_a_quantised_picture_as_it_was_loaded(generate):
    generate(
        "a red circle on white", "--model", "embedded", "--quantization", "8bit", "--steps", "1", "--output", "a.png"
    )
    generate("a red circle on white", "--model", "embedded", "--steps", "1", "--output", "plain.png")
    code, _, err = generate("--like", "a.png", "--output", "again.png")
    assert (code, err) == (0, "")
    quantised, again, plain = (Path(name).read_bytes() for name in ("a.png", "again.png", "plain.png"))
    assert quantised == again
    assert quantised != plain


def test_a_model_is_loaded_so_that_it_fits_or_not_at_all(generate):
    options = ("a red circle on white", "--model", "embedded", "--steps", "1", "--output", "a.png")
    assert generate(*options, "--memory", "2GB")[0] == 0
    code, _, err = generate(*options, "--memory", "1MB")
    assert code == 2
    assert err.startswith("sana-sprint: error: no arrangement fits 1.0 MB")


def test_like_tells_in_one_line_when_the_model_has_changed(generate, model_folder):
    generate("a")
    shutil.copytree(model_folder, "changed")
    config = Path("changed/scheduler/scheduler_config.json")
    config.write_text(config.read_text() + "\n")
    code, out, err = generate("--like", "a-0.png", "--model", "changed")
    assert (code, out) == (0, "wrote a-0-2.png\n")
    assert err.startswith("sana-sprint: warning: a-0.png was drawn with model files ")
    assert err.count("\n") == 1


def test_like_a_picture_whose_model_is_gone_says_what_to_give(generate, model_folder):
    shutil.copytree(model_folder, "gone")
    generate("a", "--model", "./gone")
    shutil.rmtree("gone")
    code, _, err = generate("--like", "a-0.png")
    assert code == 2
    assert "no folder ./gone; --model takes" in err


def test_a_sheet_replaces_the_single_pictures_and_stores_them_all(generate):
    code, out, _ = generate("a", "b", "--grid", "--seed", "2")
    assert (code, out) == (0, "wrote sheet-a-2.png\n")
    assert files() == {"sheet-a-2.png"}
    assert [(one.prompt, one.seed) for one in read_record(Path("sheet-a-2.png")).pictures] == [("a", 2), ("b", 2)]


def test_json_prints_one_document_that_says_what_was_drawn_and_nothing_else(generate, model_folder):
    code, out, err = generate("a", "b", "--json", "--steps", "1", "--output", "out")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["model"], document["steps"], document["width"], document["height"]) == (model_folder, 1, 64, 64)
    assert [(one["file"], one["prompt"], one["seed"]) for one in document["pictures"]] == [
        (os.path.join("out", "a-0.png"), "a", 0),
        (os.path.join("out", "b-0.png"), "b", 0),
    ]
    assert all(Path(one["file"]).is_file() and one["seconds"] > 0 for one in document["pictures"])


def test_a_model_with_a_flow_scheduler_is_given_twenty_steps_by_default(generate, flow_folder):
    code, out, _ = generate("a", "--model", flow_folder, "--json")
    assert (code, json.loads(out)["steps"]) == (0, 20)


def test_the_embedded_model_is_the_default_and_says_which_words_it_does_not_know(
    generate, model_folder, monkeypatch, capsys
):
    monkeypatch.setattr("sana_sprint.assets._FOLDER", Path(model_folder))  # in place of the trained one
    assert main(["generate", "a red dog", "--json", "--steps", "1"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["model"] == "embedded"
    assert printed.err.startswith("sana-sprint: warning: the embedded model does not know dog; it knows shapes: circle")
    assert main(["generate", "Hund", "--steps", "1"]) == 2
    assert "knows no word of 'Hund'" in capsys.readouterr().err
    assert files() == {"a-red-dog-0.png"}


class Terminal(io.StringIO):
    """A standard error that a person watches."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(generate, monkeypatch):
    assert generate("a", "b", "--steps", "1")[2] == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    generate("a", "b", "--steps", "1")
    assert "pictures: " in terminal.getvalue()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "65x64"], "65"),
        (["--timesteps", "2,1,0"], "pi/2"),
        (["--steps", "5000"], "5000"),
        (["--device", "quantum"], "--device quantum"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line_and_exit_code_2(generate, arguments, named):
    code, out, err = generate("a", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sana-sprint: error: ")
    assert err.count("\n") == 1
    assert named in err
    assert files() == set()


def test_a_folder_with_damaged_weights_is_one_line_and_exit_code_2(generate, model_folder):
    shutil.copytree(model_folder, "damaged")
    Path("damaged/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    code, _, err = generate("a", "--model", "damaged")
    assert (code, err.count("\n")) == (2, 1)


def test_a_prompt_too_long_is_reported_as_one_line_of_warning(generate):
    code, out, err = generate("word " * 400)
    assert (code, out.count("\n")) == (0, 1)
    assert err.startswith("sana-sprint: warning: ")
    assert err.count("\n") == 1


def test_ctrl_c_ends_with_130_and_one_line_and_leaves_no_part_of_a_file(model_folder, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sana_sprint.cli.main",
            "generate",
            "a",
            "--num-images",
            "10000",
            "--model",
            model_folder,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background, the tests it may be, with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "wrote a-0.png\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "sana-sprint: interrupted: nothing was left half written\n")
    assert all(name.endswith(".png") for name in os.listdir(tmp_path))
    for name in os.listdir(tmp_path):
        Image.open(tmp_path / name).load()
