"""A trained checkpoint and its scores to the folder that is installed with the package.

sana-sprint train shapes --output runs/shapes
sana-sprint evaluate --model runs/shapes/checkpoint --json > runs/shapes/scores.json
python scripts/embed_checkpoint.py runs/shapes/checkpoint runs/shapes/scores.json
"""

import argparse
import json
import shutil
from pathlib import Path

DESTINATION = Path(__file__).parent.parent / "src" / "sana_sprint" / "assets" / "shapes-base"


def score_table(evaluation: dict) -> str:
    """The scores as a Markdown table of one row."""
    scores = evaluation["scores"]
    titles = " | ".join(name.replace("_", " ") for name in scores)
    values = " | ".join(f"{value:.3f}" for value in scores.values())
    return f"| {titles} |\n|{' --- |' * len(scores)}\n| {values} |"


def _origin(record: dict) -> str:
    start = record["started_from"]
    if start is None:
        return ""
    steps = start["recipe"]["flow"]["optimiser"]["steps"]
    return f"""

CHECKPOINT is an earlier one of this recipe, made by `{start["command"]}` in {steps:,} flow steps. Its autoencoder is
the one here, and its transformer is where this one's training began; its record is `started_from` in
`training.json`."""


def model_card(record: dict, evaluation: dict) -> str:
    """What the checkpoint is, how it was made, and how well it draws."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    seeds = {
        "pictures": record["recipe"]["pool_seed"],
        "autoencoder": record["recipe"]["autoencoder"]["optimiser"]["seed"],
        "decoder": record["recipe"]["autoencoder"]["decoder_optimiser"]["seed"],
        "language": record["recipe"]["language"]["optimiser"]["seed"],
        "flow": record["recipe"]["flow"]["optimiser"]["seed"],
        "guidance": record["recipe"]["flow"]["guidance_optimiser"]["seed"],
    }
    return f"""# shapes-base

A SANA-Sprint pipeline in small, trained from nothing by this repository on drawn shapes: 64×64 pixels, bfloat16,
Apache-2.0. It knows circles, squares, triangles, stars and crosses, eight colours, two sizes, four grounds, numbers to
three, and left of, right of, above and below.

Made by `{record["command"]}`, with {versions}. Seeds: {", ".join(f"{name} {seed}" for name, seed in seeds.items())}.
All settings, and the losses of every stage, are in `training.json`.{_origin(record)}

The autoencoder reconstructs training pictures at {record["reconstruction_decibels"]} dB. Share of
{evaluation["num_captions"]} held-out captions that the judge finds drawn, at {evaluation["steps"]} steps and guidance
{evaluation["guidance"]} (`sana-sprint evaluate`):

{score_table(evaluation)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a trained checkpoint as the embedded one.")
    parser.add_argument("checkpoint", type=Path, help="folder that sana-sprint train wrote")
    parser.add_argument("scores", type=Path, help="what sana-sprint evaluate --json printed for it")
    options = parser.parse_args()
    record = json.loads((options.checkpoint / "training.json").read_text(encoding="utf-8"))
    evaluation = json.loads(options.scores.read_text(encoding="utf-8"))
    card = model_card(record, evaluation)  # before anything is removed
    shutil.rmtree(DESTINATION, ignore_errors=True)
    shutil.copytree(options.checkpoint, DESTINATION)
    (DESTINATION / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {DESTINATION}")


if __name__ == "__main__":
    main()
