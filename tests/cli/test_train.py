"""`sana-sprint train`: the stages of a recipe, chosen and run."""

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


def test_a_stage_leaves_its_result_in_the_folder_asked_for(tmp_path, capsys):
    assert main(["train", "shapes", "--trial", "--stage", "autoencoder", "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"wrote autoencoder below {tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "autoencoder" / "vae" / "config.json").is_file()


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
