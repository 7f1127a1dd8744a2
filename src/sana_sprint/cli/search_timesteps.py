"""`sana-sprint search-timesteps`: a model in; the angles that it draws best with, for every number of steps, out."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import held_out, screen
from sana_sprint.cli.arguments import whole_number

if TYPE_CHECKING:
    from sana_sprint.evaluation.timesteps import TimestepSearch

_SCORES = ("judge", "frechet")
_NUM_CAPTIONS = 192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    held_out.add_arguments(parser, num_captions=_NUM_CAPTIONS)
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help="numbers of steps to find angles for; those of fewer steps are found on the way (1 2 4)",
    )
    parser.add_argument(
        "--score",
        choices=_SCORES,
        default=_SCORES[0],
        help="what decides: the judge of the shapes world, or the Fréchet distance to renderings (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where timesteps.json and timesteps.png go; a search that stopped goes on there (nothing is written)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, .. (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Draws held-out captions with one timetable after the other, and prints how each did and which are best."""
    held_out.fill_in(options, **held_out.DEFAULTS, num_captions=_NUM_CAPTIONS)
    with screen.quiet_libraries():
        from sana_sprint.evaluation.plots import check_plotting
        from sana_sprint.evaluation.timesteps import plot_search, search_timesteps
        from sana_sprint.files import write_whole
        from sana_sprint.shapes.judge import score

        if options.output is not None:
            check_plotting()
        artist = held_out.open_artist(options)
        _check_scheduler(artist)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
        distance = artist.distance()

        network = artist.pipe.transformer
        computed = {"dtype": str(network.dtype), "device": network.device.type}
        kept = _KeptScores(options.output and options.output / "trials.json", {**artist.settings(), **computed})

        def score_timetable(angles: tuple[float, ...]) -> dict[str, float]:
            if angles not in kept.scores:
                pictures = artist.draw(" ".join(f"{angle:g}" for angle in angles), timesteps=list(angles))
                judged = score(pictures, artist.held_out.requests)["overall"]
                kept.add(angles, {"judge": judged, "frechet": distance(pictures)})
            return kept.scores[angles]

        search = search_timesteps(
            score_timetable, max(options.steps), options.score, lower_is_better=options.score == "frechet"
        )
        document = json.dumps({**artist.settings(), **_document(search)}, indent=2)
        if options.output is not None:
            write_whole(
                options.output / "timesteps.json", lambda path: path.write_text(document + "\n", encoding="utf-8")
            )
            plot_search(search, options.output / "timesteps.png")
            kept.remove()
    if options.json:
        print(document)
        return
    _print_trials(search)
    print()
    for steps in sorted(set(options.steps)):
        print(f"pipe(prompt, timesteps={list(search.best[steps].angles)})  # {steps} step{'s' if steps > 1 else ''}")


class _KeptScores:
    """Scores of timetables, in a file too, with which a search that was stopped goes on.

    Args:
        path: of the file, None for none. One of scores that were made with other settings counts for nothing.
        settings: what the scores hold for.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.scores: dict[tuple[float, ...], dict[str, float]] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                self.scores = {tuple(angles): scores for angles, scores in found["scores"]}

    def add(self, angles: tuple[float, ...], scores: dict[str, float]) -> None:
        from sana_sprint.files import write_whole

        self.scores[angles] = scores
        if self.path is not None:
            text = json.dumps({"settings": self.settings, "scores": list(self.scores.items())}, indent=2)
            write_whole(self.path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))

    def remove(self) -> None:
        """Remove the file, once the search is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _check_scheduler(artist: held_out.Artist) -> None:
    from sana_sprint.pipelines.clock import TrigFlowClock, clock_for

    scheduler = artist.pipe.scheduler
    if not isinstance(clock_for(scheduler), TrigFlowClock):
        raise ValueError(
            f"{artist.options.model} draws with {type(scheduler).__name__}, which has no angles to search: "
            "a model with SCMScheduler is wanted"
        )


def _document(search: "TimestepSearch") -> dict[str, Any]:
    return {
        "decided_by": search.decided_by,
        "best": {str(steps): list(trial.angles) for steps, trial in search.best.items()},
        "trials": [{"steps": trial.steps, **asdict(trial)} for trial in search.trials],
    }


def _print_trials(search: "TimestepSearch") -> None:
    from sana_sprint.evaluation.tables import aligned

    rows: list[tuple[str, ...]] = [("steps", "angles", *_SCORES, "")]
    for trial in search.trials:
        is_best = trial is search.best[trial.steps]
        angles = " ".join(f"{angle:g}" for angle in trial.angles)
        rows.append((str(trial.steps), angles, *(f"{trial.scores[name]:.4f}" for name in _SCORES), "best" * is_best))
    print("\n".join(line.rstrip() for line in aligned(rows)))
