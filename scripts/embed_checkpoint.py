"""A trained checkpoint and its scores to the folder that is installed with the package.

sana-sprint train shapes --output runs/shapes
sana-sprint evaluate --model runs/shapes/checkpoint --json > runs/shapes/scores.json
python scripts/embed_checkpoint.py runs/shapes/checkpoint runs/shapes/scores.json
"""

import argparse
import json
import shutil
import textwrap
from pathlib import Path

DESTINATION = Path(__file__).parent.parent / "src" / "sana_sprint" / "assets" / "shapes-base"


def score_table(evaluation: dict) -> str:
    """The scores as a Markdown table of one row."""
    scores = evaluation["scores"]
    titles = " | ".join(name.replace("_", " ") for name in scores)
    values = " | ".join(f"{value:.3f}" for value in scores.values())
    return f"| {titles} |\n|{' --- |' * len(scores)}\n| {values} |"


def flow_steps(record: dict) -> list[int]:
    """Steps of the flow stage, of the checkpoints that training began from and then of this one."""
    origin = record.get("started_from")
    earlier = flow_steps(origin) if origin else []
    return [*earlier, record["recipe"]["flow"]["optimiser"]["steps"]]


def model_card(record: dict, evaluation: dict) -> str:
    """What the checkpoint is, how it was made, and how well it draws."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    recipe = record["recipe"]
    seeds = {
        "pictures": recipe["pool_seed"],
        "autoencoder": recipe["autoencoder"]["optimiser"]["seed"],
        "decoder": recipe["autoencoder"]["decoder_optimiser"]["seed"],
        "language": recipe["language"]["optimiser"]["seed"],
        "flow": recipe["flow"]["optimiser"]["seed"],
        "guidance": recipe["flow"]["guidance_optimiser"]["seed"],
    }
    *earlier, _ = steps = [f"{count:,}" for count in flow_steps(record)]
    paragraphs = [
        "A SANA-Sprint pipeline in small, trained from nothing by this repository on drawn shapes: 64×64 pixels,"
        " bfloat16, Apache-2.0. It knows circles, squares, triangles, stars and crosses, eight colours, two sizes, four"
        " grounds, numbers to three, and left of, right of, above and below.",
        f"Made by `{record['command']}`, with {versions}. Seeds: "
        + ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        + ". All settings, and the losses of every stage, are in `training.json`.",
        f"CHECKPOINT is an earlier one of this recipe. In all there were {' + '.join(steps)} flow steps; what each"
        " stage began from is `started_from` in `training.json`."
        if earlier
        else "",
        f"The autoencoder reconstructs training pictures at {record['reconstruction_decibels']} dB. Share of"
        f" {evaluation['num_captions']} held-out captions that the judge finds drawn, at {evaluation['steps']} steps"
        f" and guidance {evaluation['guidance']} (`sana-sprint evaluate`):",
    ]
    filled = [textwrap.fill(text, 120, break_on_hyphens=False) for text in paragraphs if text]
    return "\n\n".join(["# shapes-base", *filled, score_table(evaluation)]) + "\n"


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
