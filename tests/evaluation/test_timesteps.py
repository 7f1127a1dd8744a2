"""The timestep search on scores whose best timetables are known, and its plot."""

import sys

import pytest
from PIL import Image

from sana_sprint.evaluation.timesteps import (
    FIRST_ANGLES,
    LATER_ANGLES,
    SECOND_ANGLES,
    Candidates,
    Trial,
    plot_search,
    search_timesteps,
)
from sana_sprint.trigflow.scheduler import SCMScheduler

BEST = (1.55651, 1.3, 1.1, 0.6)


def distance_to_best(angles: tuple[float, ...]) -> float:
    return sum((angle - best) ** 2 for angle, best in zip(angles[:-1], BEST))


def test_the_angles_are_found_one_after_the_other_each_with_those_before_it_kept():
    asked = []

    def score(angles: tuple[float, ...]) -> dict[str, float]:
        asked.append(angles)
        return {"judge": -distance_to_best(angles)}

    search = search_timesteps(score)
    assert {steps: trial.angles for steps, trial in search.best.items()} == {
        1: (1.55651, 0.0),
        2: (1.55651, 1.3, 0.0),
        3: (1.55651, 1.3, 1.1, 0.0),
        4: (1.55651, 1.3, 1.1, 0.6, 0.0),
    }
    third = [angle for angle in LATER_ANGLES if angle > LATER_ANGLES[0]]  # the fourth needs one below it
    assert asked == [
        *((angle, 0.0) for angle in FIRST_ANGLES),
        *((1.55651, angle, 0.0) for angle in SECOND_ANGLES),
        *((1.55651, 1.3, angle, 0.0) for angle in third),
        *((1.55651, 1.3, 1.1, angle, 0.0) for angle in LATER_ANGLES if angle < 1.1),
    ]
    assert [trial.angles for trial in search.trials] == asked


def test_a_first_angle_that_is_best_alone_is_kept_where_another_would_be_better_in_two_steps():
    scores = {(1.5, 0.0): 1.0, (1.4, 0.0): 0.0, (1.5, 1.0, 0.0): 0.1, (1.4, 1.0, 0.0): 9.0}
    search = search_timesteps(
        lambda angles: {"judge": scores[angles]}, 2, candidates=Candidates(first=(1.4, 1.5), second=(1.0,))
    )
    assert search.best[2] == Trial((1.5, 1.0, 0.0), {"judge": 0.1})


def test_of_several_scores_the_one_named_decides_and_may_be_a_distance():
    def score(angles: tuple[float, ...]) -> dict[str, float]:
        return {"judge": angles[0], "frechet": distance_to_best(angles)}

    by_distance = search_timesteps(score, 2, decided_by="frechet", lower_is_better=True)
    assert by_distance.best[2].angles == (1.55651, 1.3, 0.0)
    assert by_distance.best[1].scores == {"judge": 1.55651, "frechet": 0.0}
    assert search_timesteps(score, 1).best[1].angles == (max(FIRST_ANGLES), 0.0)


def test_of_equal_scores_the_first_tried_is_taken():
    best = search_timesteps(lambda angles: {"judge": 0.5}, 2).best
    assert best[2].angles == (FIRST_ANGLES[0], SECOND_ANGLES[0], 0.0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_whatever_is_best_every_timetable_descends_and_the_scheduler_takes_it(sign):
    """With -1 the smallest angle is always best, which must not leave later steps without any."""
    search = search_timesteps(lambda angles: {"judge": sign * sum(angles)}, 5)
    assert set(search.best) == {1, 2, 3, 4, 5}
    scheduler = SCMScheduler()
    for trial in search.trials:
        scheduler.set_timesteps(timesteps=trial.angles)
        assert scheduler.num_inference_steps == trial.steps


def test_the_candidates_are_those_of_the_paper():
    assert FIRST_ANGLES == (1.5458, 1.5508, 1.55413, 1.55651, 1.5683, 1.5708)


def test_a_search_that_cannot_end_is_refused_before_anything_is_scored():
    def score(angles: tuple[float, ...]) -> dict[str, float]:
        raise AssertionError(f"scored {angles}")

    for most_steps, candidates in [(0, None), (12, None), (2, Candidates(first=(1.0,), second=(1.0, 1.2)))]:
        with pytest.raises(ValueError, match=f"none for {most_steps} steps"):
            search_timesteps(score, most_steps, candidates=candidates)


@pytest.mark.parametrize("scores", [{"judge": float("nan")}, {"other": 1.0}, {}])
def test_a_deciding_score_that_is_no_number_is_refused(scores):
    with pytest.raises(ValueError, match=r"'judge' of \[1\.5458, 0\.0\] must be a finite number"):
        search_timesteps(lambda angles: scores, 1)


def test_the_plot_has_a_column_for_each_number_of_steps_and_a_row_for_each_score(tmp_path):
    pytest.importorskip("matplotlib")

    def size_of(most_steps: int, *names: str) -> tuple[int, int]:
        search = search_timesteps(lambda angles: dict.fromkeys(names, angles[-2]), most_steps, names[0])
        plot_search(search, tmp_path / "plot.png")
        assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
        with Image.open(tmp_path / "plot.png") as image:
            assert image.format == "PNG"
            return image.size

    (width, height), (twice_width, twice_height) = size_of(1, "judge"), size_of(2, "judge", "frechet")
    assert (twice_width, twice_height) == (2 * width, 2 * height)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    search = search_timesteps(lambda angles: {"judge": 1.0}, 1)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'sana-sprint\[train\]'"):
        plot_search(search, tmp_path / "plot.png")
