"""`sana-sprint bench --quick` from end to end, its exit codes, and its options."""

import json
import sys

import pytest
import torch

from sana_sprint.bench.cases import CASES, GROUPS
from sana_sprint.bench.twins import MODELS, Twins
from sana_sprint.cli import bench
from sana_sprint.cli.main import build_parser, main

# The same path as without options, in pictures of a quarter of the width and one round.
SMALL = ["bench", "--quick", "--size", "64", "--rounds", "1", "--device", "cpu"]


def settings_of(*arguments: str):
    return bench.read_settings(build_parser().parse_args(["bench", *arguments]))


def test_quick_prints_a_table_and_ends_with_one_document(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--output", str(tmp_path / "new")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1].startswith("quick: ")
    assert lines[3].split()[0] == "case"
    document = json.loads(lines[-1])
    table = lines[3 : lines.index("", 3)]
    assert len(table) == 1 + len(document["rows"])
    assert "large matrix product in float32" in lines[-2]
    assert document["quick"] is True
    assert document["agrees"] is True
    assert {row["case"].split(",")[0] for row in document["rows"]} == set(GROUPS)
    assert all(len(row["ours"]["seconds"]) == len(row["theirs"]["seconds"]) == 1 for row in document["rows"])
    assert (document["dtype"], document["compiled"], document["rounds"], document["seed"]) == ("float32", False, 1, 0)
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["diffusers"]
    assert document["peak_operations_per_second"] > 0
    assert "[7/7] picture, 4 steps, quick, 64x64, batch 1" in captured.err
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == document
    assert (tmp_path / "new" / "bench.png").exists()


def test_results_that_differ_are_printed_and_the_command_fails(capsys, monkeypatch):
    make_pair = Twins.pair

    def altered(self, names):
        pair = make_pair(self, names)
        head = pair.theirs.vae.decoder.conv_out
        head.weight = torch.nn.Parameter(head.weight * 1.01, requires_grad=False)
        return pair

    monkeypatch.setattr(Twins, "pair", altered)
    assert main([*SMALL, "--cases", "decode"]) == 1
    captured = capsys.readouterr()
    *_, remark, document = captured.out.splitlines()
    assert remark == "decode, 64x64, batch 1: ours and diffusers' results differ"
    assert json.loads(document)["agrees"] is False
    assert captured.err.splitlines()[-1].startswith("sana-sprint: error: ")


def test_what_was_measured_before_a_failure_is_kept(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    make_pair = Twins.pair

    def failing(self, names):
        if "vae" in names:
            raise torch.OutOfMemoryError("no memory")
        return make_pair(self, names)

    monkeypatch.setattr(Twins, "pair", failing)
    assert main([*SMALL, "--cases", "step", "decode", "--output", str(tmp_path)]) == 2
    assert "no memory" in capsys.readouterr().err
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert [row["case"] for row in document["rows"]] == ["step"]


def test_float8_is_told_of_in_title_and_document(capsys):
    pytest.importorskip("torchao", reason="torchao is not installed")
    assert main([*SMALL, "--cases", "step", "--float8"]) == 0
    captured = capsys.readouterr()
    title, *_, document = captured.out.splitlines()
    assert "our transformer in float8 (weights alone: products are slower)" in title
    assert json.loads(document)["float8"] is True
    assert all("float8" in line or line.startswith(("[", "quick")) for line in captured.err.splitlines())


def test_the_choices_are_those_of_the_library():
    assert set(bench._CASES) == set(GROUPS)
    assert set(bench._STEPS) == {case.steps for case in CASES if case.group == "picture"}
    assert set(bench._MODELS) == set(MODELS)


def test_defaults_are_the_large_model_at_1024_pixels():
    settings = settings_of("--device", "cpu")
    assert list(settings.models) == ["1.6b"]
    assert settings.models["1.6b"].transformer["guidance_embeds"] is True
    assert (settings.sizes, settings.batches, settings.rounds) == (((1024, 1024),), (1,), 5)
    assert (settings.dtype, settings.device.type, settings.compiles) == (torch.float32, "cpu", False)


def test_options_are_read_without_repetitions():
    settings = settings_of(
        *("--model", "0.6b", "1.6b", "--size", "512", "1024x768", "512x512", "--batch", "1", "4", "4"),
        *("--cases", "step", "decode", "--dtype", "bfloat16", "--device", "cpu", "--compile", "--rounds", "7"),
    )
    assert list(settings.models) == ["0.6b", "1.6b"]
    assert settings.sizes == ((512, 512), (1024, 768))
    assert settings.batches == (1, 4)
    assert [case.name for case in settings.cases] == ["step", "decode"]
    assert (settings.dtype, settings.compiles, settings.rounds) == (torch.bfloat16, True, 7)


def test_pictures_may_be_of_some_numbers_of_steps_only():
    settings = settings_of("--cases", "text", "picture", "--steps", "1", "4")
    assert [case.name for case in settings.cases] == [
        *("text, new prompt", "text, same prompt", "picture, 1 step", "picture, 4 steps"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--model", "0.6b"], "--quick and --model exclude each other"),
        (["--cases", "step", "--steps", "1"], "--steps is of whole pictures: add picture to --cases"),
        (["--size", "100"], "multiples of 32 pixels, got 100x100"),
        (["--size", "big"], "wanted width and height in pixels"),
        (["--cases", "paint"], "'paint'"),
        pytest.param(
            ["--quick", "--device", "cuda"],
            "cannot draw on --device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    try:
        code = main(["bench", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_plot_that_cannot_be_drawn_is_an_error_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--output", str(tmp_path / "new")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "sana-sprint: error: plots need matplotlib: pip install 'sana-sprint[train]'\n"
    assert list(tmp_path.iterdir()) == []
