"""`sana-sprint evaluate` of a model: its scores as a table and as JSON, for one number of steps and for several."""

import json

import pytest

from sana_sprint.cli.main import main
from sana_sprint.shapes.scenes import CATEGORIES

NOTHING = dict.fromkeys((*CATEGORIES, "overall"), 0.0)


@pytest.fixture
def evaluate(model_folder, capsys):
    """Runs the command on a few captions of the tiny model and returns what it printed."""

    def run(*arguments: str, model: str = model_folder) -> str:
        assert main(["evaluate", "--model", model, "--num-captions", "6", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_a_model_with_random_weights_scores_nothing_in_every_category(evaluate):
    document = json.loads(evaluate("--steps", "1", "--json"))
    assert document["scores"] == NOTHING
    names = {"model", "fingerprint", "num_captions", "steps", "guidance", "seed", "quantization", "scores"}
    assert document.keys() == names
    assert document["steps"] == 1


def test_a_model_has_its_own_number_of_steps(evaluate):
    assert json.loads(evaluate("--json"))["steps"] == 2


def test_several_numbers_of_steps_are_the_results_of_each_alone(evaluate):
    together = json.loads(evaluate("--steps", "1", "3", "--frechet", "--json"))
    assert "steps" not in together
    alone = [json.loads(evaluate("--steps", steps, "--frechet", "--json")) for steps in ("1", "3")]
    assert together["results"] == [{name: one[name] for name in ("steps", "scores", "frechet")} for one in alone]
    assert alone[0]["frechet"]["distance"] != alone[1]["frechet"]["distance"]


def test_the_table_has_a_row_for_each_number_of_steps_and_a_column_for_each_category(evaluate):
    title, header, *rows = evaluate("--steps", "1", "2").splitlines()
    assert title == "6 held-out captions, guidance 4.5"
    assert header.split("  ", 1)[0] == "steps"
    assert [name in header for name in ("single object", "colour attribution", "overall")] == [True] * 3
    assert [row.split() for row in rows] == [["1", *["0.000"] * 7], ["2", *["0.000"] * 7]]


def test_the_distance_is_the_last_column_and_a_line_says_what_it_is_to(evaluate):
    _, header, row, last = evaluate("--steps", "1", "--frechet").splitlines()
    assert header.split()[-1] == "Fréchet"
    assert float(row.split()[-1]) > 0
    assert last == "Fréchet distance to 24 renderings of the captions, by the model's autoencoder"


def test_the_distance_of_the_embedded_model_is_not_far_from_that_of_true_pictures(evaluate):
    """Six true pictures have about 0.3 to 24 others, and those of a flow model in one step, which are blurs, over 1."""
    document = json.loads(evaluate("--steps", "1", "--frechet", "--json", model="embedded"))
    assert 0.3 < document["frechet"]["distance"] < 1
    assert document["frechet"]["num_references"] == 24


def test_few_pictures_for_the_features_are_warned_of(model_folder, capsys):
    arguments = ["evaluate", "--model", model_folder, "--steps", "1", "--frechet", "--num-captions"]
    assert main([*arguments, "6"]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("sana-sprint: warning: 6 pictures are few for 8 features")
    assert warning.count("\n") == 1
    assert main([*arguments, "9"]) == 0
    assert capsys.readouterr().err == ""


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["evaluate", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge"], "--judge: this needs --pictures"),
        (["--reference", "a", "--size", "8"], "--reference, --size: this needs --pictures"),
        (["--pictures", "a"], "--reference, --clip or --judge"),
        (["--pictures", "a", "--judge", "--seed", "1"], "--seed: nothing is drawn"),
        (["--pictures", "a", "--judge", "--num-captions", "9", "--frechet"], "--num-captions, --frechet: nothing"),
        (["--pictures", "a", "--reference", "b", "--captions", "c"], "--captions: this needs --clip or --judge"),
        (["--pictures", "a", "--judge", "--features", "embedded"], "--features: this needs --reference"),
        (["--pictures", "nowhere", "--judge"], "no folder nowhere"),
    ],
)
def test_options_that_have_no_effect_are_refused_in_one_line(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_controlnet_is_scored_by_places_and_colours_for_each_number_of_steps(evaluate, control_folder):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    options = ("--controlnet", control_folder, "--steps", "1", "2")
    document = json.loads(evaluate(*options, "--json"))
    assert document["controlnet"] == control_folder
    assert [result["steps"] for result in document["results"]] == [1, 2]
    for result in document["results"]:
        scores = result["scores"]
        # Noise stands out from every ground, nearly everywhere; a colour of the world it hardly is.
        assert 0 < scores["intersection_over_union"] < 0.5
        assert scores["colours"] == scores["base_colours"] == scores["open_captions"] == 0
    title, header, *rows = evaluate(*options).splitlines()
    assert title == "6 held-out scenes by their edges and colours, guidance 4.5"
    assert [name in header for name in ("intersection over union", "base colours", "open captions")] == [True] * 3
    assert len(rows) == 2


def test_a_controlnet_has_no_distance(model_folder, control_folder, capsys):
    assert main(["evaluate", "--model", model_folder, "--controlnet", control_folder, "--frechet"]) == 2
    assert "--frechet: not with --controlnet" in capsys.readouterr().err
