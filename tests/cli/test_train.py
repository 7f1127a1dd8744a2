"""`sana-sprint train`: the stages of a recipe, run to a checkpoint that `generate` draws with."""

from pathlib import Path

import pytest

from sana_sprint.cli.main import main
from sana_sprint.cli.train import STAGES


def test_the_stages_offered_are_those_of_the_recipe():
    from sana_sprint.training.shapes import STAGES as OF_RECIPE

    assert STAGES == OF_RECIPE


def test_a_stage_without_its_predecessors_result_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["train", "shapes", "--trial", "--stage", "assemble", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sana-sprint: error: stage 'guidance' has left no result")
    assert err.count("\n") == 1


def test_a_trial_of_all_stages_ends_in_a_checkpoint_that_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "shapes", "--trial"]) == 0
    checkpoint = Path("runs/shapes/checkpoint")
    assert f"wrote {checkpoint}; draw with" in capsys.readouterr().out
    assert main(["generate", "a red circle", "--model", str(checkpoint), "--steps", "1"]) == 0
    assert Path("a-red-circle-0.png").is_file()


@pytest.mark.parametrize("arguments", [["train"], ["train", "cats"], ["train", "shapes", "--stage", "paint"]])
def test_what_is_no_recipe_and_no_stage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
