"""`sana-sprint evaluate`: the score of a model, as a table and as JSON."""

import json

from sana_sprint.cli.main import main
from sana_sprint.shapes.scenes import CATEGORIES


def test_a_model_with_random_weights_scores_nothing_in_every_category(model_folder, capsys):
    arguments = ["evaluate", "--model", str(model_folder), "--num-captions", "6", "--steps", "1", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["scores"] == dict.fromkeys((*CATEGORIES, "overall"), 0.0)
    assert document["steps"] == 1


def test_the_table_has_a_line_for_each_category(model_folder, capsys):
    assert main(["evaluate", "--model", str(model_folder), "--num-captions", "6", "--steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 held-out captions, 1 steps, guidance 4.5"
    assert [line.split()[0] for line in lines[1:]] == [*(name.split("_")[0] for name in CATEGORIES), "overall"]


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["evaluate", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
