"""`sana-sprint search-timesteps` on a tiny model: what was tried, what is best, and the files and code that say so."""

import json

import pytest
import torch
from PIL import Image

from sana_sprint import SanaSprintPipeline
from sana_sprint.cli.held_out import Artist
from sana_sprint.cli.main import main
from sana_sprint.evaluation.timesteps import FIRST_ANGLES, SECOND_ANGLES

FEW = ("--num-captions", "9")


@pytest.fixture
def search(model_folder, capsys):
    """Runs the command on a few captions of the tiny model and returns what it printed."""

    def run(*arguments: object) -> str:
        assert main(["search-timesteps", "--model", model_folder, *FEW, *map(str, arguments)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def test_the_table_names_every_trial_and_the_code_draws_with_the_best(search, model_folder):
    lines = search("--steps", 2, 1, "--score", "frechet").splitlines()
    header, rows, (blank, *code) = lines[0], lines[1:-3], lines[-3:]
    assert (header.split(), blank) == (["steps", "angles", "judge", "frechet"], "")
    assert len(rows) == len(FIRST_ANGLES) + len(SECOND_ANGLES)
    best = [row.split() for row in rows if row.endswith("best")]
    for steps, (row, line) in enumerate(zip(best, code, strict=True), start=1):
        tried = [
            float(other.split()[-2 if "best" in other else -1]) for other in rows if int(other.split()[0]) == steps
        ]
        assert (int(row[0]), float(row[-2])) == (steps, min(tried))
        angles = [float(angle) for angle in row[1 : steps + 2]]
        assert line == f"pipe(prompt, timesteps={angles})  # {steps} step{'s' if steps > 1 else ''}"
        pipe = SanaSprintPipeline.from_pretrained(model_folder)
        pipe.set_progress_bar_config(disable=True)
        names = {"pipe": pipe, "prompt": "a red circle"}
        exec(line, names)
        torch.testing.assert_close(pipe.scheduler.timesteps, torch.tensor(angles))


def test_the_files_hold_what_the_screen_does(search, tmp_path):
    pytest.importorskip("matplotlib")
    document = json.loads(search("--steps", 1, "--output", tmp_path / "new" / "folder", "--json"))
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["timesteps.json", "timesteps.png"]
    assert json.loads((folder / "timesteps.json").read_text()) == document
    with Image.open(folder / "timesteps.png") as image:
        assert image.format == "PNG"
    assert document["decided_by"] == "judge"
    assert document["num_captions"] == 9
    assert [trial["angles"] for trial in document["trials"]] == [[angle, 0.0] for angle in FIRST_ANGLES]
    assert all(trial["scores"].keys() == {"judge", "frechet"} for trial in document["trials"])
    # A model with random weights draws nothing that the judge accepts, and of equal scores the first is taken.
    assert document["best"] == {"1": [FIRST_ANGLES[0], 0.0]}


def test_a_search_that_stopped_goes_on_with_the_scores_that_it_has(search, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    options = ("--steps", 1, "--score", "frechet", "--json")
    wanted = search(*options)
    drawn, draw, most = [], Artist.draw, 3

    def counted(self, title, **timetable):
        if len(drawn) == most:
            raise KeyboardInterrupt
        drawn.append(title)
        return draw(self, title, **timetable)

    monkeypatch.setattr(Artist, "draw", counted)
    with pytest.raises(AssertionError):  # for the exit code is another one
        search(*options, "--output", tmp_path)
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]
    most = len(FIRST_ANGLES)
    assert search(*options, "--output", tmp_path) == wanted
    assert len(drawn) == len(set(drawn)) == len(FIRST_ANGLES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timesteps.json", "timesteps.png"]


def test_a_search_repeated_finds_the_same(search):
    arguments = ("--steps", 1, "--score", "frechet", "--json")
    assert search(*arguments) == search(*arguments)


def test_a_flow_model_has_no_angles_and_nothing_is_written(tmp_path, flow_folder, capsys):
    assert main(["search-timesteps", "--model", flow_folder, *FEW, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"sana-sprint: error: {flow_folder} draws with FlowMatchEulerDiscreteScheduler, which has no angles to search: "
        "a model with SCMScheduler is wanted\n"
    )
    assert not (tmp_path / "out").exists()


def test_more_steps_than_there_are_angles_for_are_refused(model_folder, capsys):
    assert main(["search-timesteps", "--model", model_folder, *FEW, "--steps", "20"]) == 2
    assert "needs descending angles to try, and has none for 20 steps" in capsys.readouterr().err
