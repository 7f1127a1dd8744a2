"""A score of timetables to the best one for every number of steps, one angle after the other.

Angles are in radians, 0 clean, pi/2 noise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_sprint.evaluation.plots import check_plotting
from sana_sprint.files import write_whole

# A timetable (descending, from the first angle down to 0) to named scores of what is drawn with it.
ScoreTimetable = Callable[[tuple[float, ...]], Mapping[str, float]]

# What SANA-Sprint's search tried (arXiv 2503.09641, Figure 6). The first angles are arctan(sigma / 0.5) for noise of
# sigma 20 to 200, and pi/2; all to five digits, so that what is printed is what was tried.
FIRST_ANGLES = (*(round(math.atan(n / 0.5), 5) for n in (20, 25, 30, 35, 200)), round(math.pi / 2, 5))
SECOND_ANGLES = (1.0, 1.1, 1.2, 1.3, 1.4)
# The figure shows 0.4 to 0.9, but the four steps that the paper chose (Table 7) hold a 1.1.
LATER_ANGLES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The angles to try where the first step starts, where the second does, and where every later one does."""

    first: tuple[float, ...] = FIRST_ANGLES
    second: tuple[float, ...] = SECOND_ANGLES
    later: tuple[float, ...] = LATER_ANGLES

    def after(self, chosen: tuple[float, ...], most_steps: int) -> list[float]:
        """The angles to try behind those chosen, such that later steps up to `most_steps` still have angles to try."""
        step = len(chosen)
        angles = (self.first, self.second)[step] if step < 2 else self.later
        return [
            angle
            for angle in angles
            if (not chosen or angle < chosen[-1])
            and (step + 1 == most_steps or self.after((*chosen, angle), most_steps))
        ]


@dataclass(frozen=True)
class Trial:
    """A timetable and the scores of what was drawn with it."""

    angles: tuple[float, ...]
    scores: dict[str, float]

    @property
    def steps(self) -> int:
        return len(self.angles) - 1


@dataclass(frozen=True)
class TimestepSearch:
    """What a search tried, in order; which score decided; and the best trial by number of steps, from 1 on."""

    trials: tuple[Trial, ...]
    decided_by: str
    best: dict[int, Trial]


def search_timesteps(
    score: ScoreTimetable,
    most_steps: int = 4,
    decided_by: str = "judge",
    lower_is_better: bool = False,
    candidates: Candidates | None = None,
) -> TimestepSearch:
    """The sequential search of SANA-Sprint (arXiv 2503.09641, Figure 6).

    The first angle is the one that is best in a single step. With it kept, the angle between two steps is the one that
    is best in two; with both kept, the third is the one that is best in three, and so on. So `most_steps` of 4 takes
    about 25 trials, where trying all combinations would take a thousand.

    Args:
        score: Called once for every timetable that is tried. Its noise decides close cases: scores should be of the
            same captions and the same seeds every time.
        most_steps: The largest number of steps to find a timetable for.
        decided_by: The name of the score that decides; of equal ones, the first tried is taken.
        lower_is_better: Whether that score is a distance.
        candidates: The angles to try; those of the paper by default.

    Raises:
        ValueError: if the candidates do not suffice for so many steps (before anything is scored), and if the deciding
            score is missing or no finite number.
    """
    candidates = candidates or Candidates()
    if most_steps < 1 or not candidates.after((), most_steps):
        raise ValueError(
            f"a search for 1 step or more needs descending angles to try, and has none for {most_steps} steps"
        )
    sign = -1 if lower_is_better else 1
    chosen: tuple[float, ...] = ()
    trials: list[Trial] = []
    best: dict[int, Trial] = {}
    for steps in range(1, most_steps + 1):
        tried = [_try((*chosen, angle, 0.0), score, decided_by) for angle in candidates.after(chosen, most_steps)]
        best[steps] = max(tried, key=lambda trial: sign * trial.scores[decided_by])
        chosen = best[steps].angles[:-1]
        trials += tried
    return TimestepSearch(tuple(trials), decided_by, best)


def _try(angles: tuple[float, ...], score: ScoreTimetable, decided_by: str) -> Trial:
    scores = dict(score(angles))
    if not math.isfinite(scores.get(decided_by, math.nan)):
        raise ValueError(f"the score {decided_by!r} of {list(angles)} must be a finite number, got {scores}")
    return Trial(angles, scores)


def plot_search(search: TimestepSearch, path: Path) -> None:
    """Write a PNG with a column for each number of steps and a row for each score, over the angle that was tried.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    names = list(search.trials[0].scores)
    figure = Figure(figsize=(3.2 * len(search.best), 2.6 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(search.best), squeeze=False)
    for column, (steps, best) in enumerate(search.best.items()):
        tried = sorted((trial for trial in search.trials if trial.steps == steps), key=lambda trial: trial.angles[-2])
        for row, name in enumerate(names):
            _plot_stage(panels[row][column], tried, best, name)
        panels[0][column].set_title(f"{steps} step{'s' if steps > 1 else ''}")
        panels[-1][column].set_xlabel(", ".join([*(f"{angle:g}" for angle in best.angles[:-2]), "t", "0"]))
    for row, name in enumerate(names):
        panels[row][0].set_ylabel(f"{name} (decides)" if name == search.decided_by else name)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def _plot_stage(panel: Any, tried: list[Trial], best: Trial, name: str) -> None:
    panel.plot([trial.angles[-2] for trial in tried], [trial.scores[name] for trial in tried], "o-", markersize=3)
    panel.plot(best.angles[-2], best.scores[name], "o", markersize=8, fillstyle="none", color="black")
