"""A trained checkpoint, its scores and its best timetables to the folder that is installed with the package.

sana-sprint train shapes --output runs/shapes
sana-sprint search-timesteps --model runs/shapes/checkpoint --output runs/shapes/search
python scripts/embed_checkpoint.py runs/shapes/checkpoint --timesteps runs/shapes/search/timesteps.json
sana-sprint evaluate --steps 1 2 4 --frechet --json > runs/shapes/scores.json
python scripts/embed_checkpoint.py --scores runs/shapes/scores.json
"""

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

from sana_sprint.checkpoints.staging import staged

DESTINATION = Path(__file__).parent.parent / "src" / "sana_sprint" / "assets" / "shapes-base"
SCHEDULER = DESTINATION / "scheduler" / "scheduler_config.json"


def table(rows: list[list[str]]) -> str:
    """Markdown, the first row its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def score_table(evaluation: dict[str, Any], timetables: dict[str, list[float]]) -> str:
    """The scores, a row for each number of steps, with the angles that were drawn from."""
    results = evaluation.get("results", [evaluation])
    rows = [["steps", "angles", *(name.replace("_", " ") for name in results[0]["scores"]), "Fréchet"]]
    for result in results:
        angles = ", ".join(f"{angle:g}" for angle in timetables.get(str(result["steps"]), []))
        scores = [f"{value:.3f}" for value in result["scores"].values()]
        rows.append([str(result["steps"]), angles, *scores, f"{result['frechet']['distance']:.4f}"])
    return table(rows)


def loop_of(recipe: dict[str, Any], *stage: str) -> dict[str, Any]:
    """A stage's loop in a record's recipe; in older records its optimiser says it."""
    *path, name = stage
    for part in path:
        recipe = recipe[part]
    return recipe.get(f"{name}_loop".removeprefix("_")) or recipe[f"{name}_optimiser".removeprefix("_")]


def stage_steps(record: dict[str, Any], *stage: str) -> list[int]:
    """Steps of a stage, of the checkpoints that training began from and then of this one."""
    origin = record.get("started_from")
    earlier = stage_steps(origin, *stage) if origin else []
    return [*earlier, loop_of(record["recipe"], *stage)["steps"]]


def _went_on(record: dict[str, Any]) -> str:
    """What was made of the recipe's transformer afterwards; nothing in most records."""
    rounds = []
    for each in record.get("went_on", []):
        runs = " and ".join(f"{run['steps']:,} steps (seed {run['seed']})" for run in each["runs"])
        rounds.append(f"by {runs} to {each['result']}")
    return f"The transformer went on from what that command made, by hand: {'; '.join(rounds)}." if rounds else ""


def model_card(record: dict[str, Any], evaluation: dict[str, Any], timetables: dict[str, list[float]]) -> str:
    """What the checkpoint is, how it was made, and how well it draws."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    recipe = record["recipe"]
    loops = {
        "autoencoder": ("autoencoder", ""),
        "decoder": ("autoencoder", "decoder"),
        "encoder": ("autoencoder", "encoder"),
        "language": ("language", ""),
        "flow": ("flow", ""),
        "guidance": ("flow", "guidance"),
        "consistency": ("consistency",),
        "distillation": ("distillation",),
        "adversarial": ("adversarial",),
        "one_step": ("one_step",),
        "matching": ("matching",),
        "expansion": ("expansion",),
        "several_steps": ("several_steps",),
    }
    seeds = {"pictures": recipe["pool_seed"]}
    # A checkpoint that began from another has these from there, and no losses of theirs.
    known = {"autoencoder", "decoder", "language", *record["losses"]}
    seeds |= {name: loop_of(recipe, *loops[name])["seed"] for name in loops if name in known}
    *earlier, _ = steps = [f"{count:,}" for count in stage_steps(record, "flow", "")]
    paragraphs = [
        "A SANA-Sprint pipeline in small, trained from nothing by this repository on drawn shapes: 64×64 pixels,"
        " bfloat16, Apache-2.0. It knows circles, squares, triangles, stars and crosses, eight colours, two sizes, four"
        " grounds, numbers to three, and left of, right of, above and below. It draws in one to four steps.",
        f"Made by `{record['command']}`, with {versions}. Seeds: "
        + ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        + ". All settings, and the losses of every stage, are in `training.json`; docs/training.md tells the rounds.",
        f"CHECKPOINT is an earlier one of this recipe. In all there were {' + '.join(steps)} flow steps; what each"
        " stage began from is `started_from` in `training.json`."
        if earlier
        else "",
        _went_on(record),
        f"The autoencoder reconstructs training pictures at {record['reconstruction_decibels']} dB. Share of"
        f" {evaluation['num_captions']} held-out captions that the judge finds drawn, at guidance"
        f" {evaluation['guidance']}, and Fréchet distance to renderings (`sana-sprint evaluate --frechet`):",
    ]
    filled = [textwrap.fill(text, 120, break_on_hyphens=False) for text in paragraphs if text]
    return "\n\n".join(["# shapes-base", *filled, score_table(evaluation, timetables)]) + "\n"


def replace_folder(destination: Path, source: Path) -> None:
    """A copy of a checkpoint in the place of another, which stays where it is until the copy is whole."""
    with staged(destination, force=True) as folder:
        shutil.copytree(source, folder)
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)


def install(checkpoint: Path, search: Path | None) -> None:
    """Replace the embedded checkpoint; what a timestep search has found best goes into its scheduler's config."""
    timetables = json.loads(search.read_text(encoding="utf-8"))["best"] if search else {}  # before anything is removed
    replace_folder(DESTINATION, checkpoint)
    if timetables:
        config = json.loads(SCHEDULER.read_text(encoding="utf-8"))
        content = json.dumps({**config, "_timesteps": timetables}, indent=2)
        SCHEDULER.write_text(content + "\n", encoding="utf-8")


def write_card(scores: Path) -> None:
    """Write the embedded checkpoint's README by its record and its scores."""
    record = json.loads((DESTINATION / "training.json").read_text(encoding="utf-8"))
    evaluation = json.loads(scores.read_text(encoding="utf-8"))
    timetables = json.loads(SCHEDULER.read_text(encoding="utf-8")).get("_timesteps", {})
    (DESTINATION / "README.md").write_text(model_card(record, evaluation, timetables), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a trained checkpoint as the embedded one, or write its card.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder that sana-sprint train wrote")
    parser.add_argument("--timesteps", type=Path, help="timesteps.json of sana-sprint search-timesteps")
    parser.add_argument("--scores", type=Path, help="what sana-sprint evaluate --frechet --json printed")
    options = parser.parse_args()
    if not (options.checkpoint or options.scores) or (options.timesteps and not options.checkpoint):
        parser.error("name a checkpoint to install, with --timesteps if there are any, or --scores, or both")
    if options.checkpoint:
        install(options.checkpoint, options.timesteps)
    if options.scores:
        write_card(options.scores)
    print(f"wrote {DESTINATION}")


if __name__ == "__main__":
    main()
