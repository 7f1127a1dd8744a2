"""A trained ControlNet and its scores to the folder that is installed beside the embedded checkpoint.

sana-sprint train shapes_control --set teacher=TRANSFORMER student=embedded --output runs/shapes_control
sana-sprint evaluate --controlnet runs/shapes_control/controlnet --steps 1 2 4 --json > runs/shapes_control/scores.json
python scripts/embed_controlnet.py runs/shapes_control/controlnet --scores runs/shapes_control/scores.json
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from embed_checkpoint import DESTINATION as CHECKPOINT
from embed_checkpoint import replace_folder, table

DESTINATION = CHECKPOINT.parent / "shapes-control"


def _stages(recipe: dict[str, Any]) -> str:
    """The stages' names with their steps and seeds, in order."""
    loops = {name.removesuffix("_loop"): loop for name, loop in recipe.items() if name.endswith("_loop")}
    return ", ".join(f"{stage} {loop['steps']:,} (seed {loop['seed']})" for stage, loop in loops.items())


def model_card(record: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """What the ControlNet is, how it was made, and how well it is followed."""
    recipe = record["recipe"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    paragraphs = [
        "A ControlNet for shapes-base by edges, in bfloat16, Apache-2.0: it copies"
        f" {recipe['num_layers']} of the teacher's five blocks. Draw by it with `sana-sprint generate"
        ' "red and blue on a white ground" --control-image PICTURE`.',
        f"Made by `sana-sprint train shapes_control --set teacher={recipe['teacher']} student={recipe['student']}` with"
        f" {versions}. Steps of {recipe['control_loop']['batch_size']} pictures: {_stages(recipe)}. All settings, and"
        " the losses of all stages, are in `training.json`; docs/control.md tells more.",
        f"Scores on {evaluation['num_captions']} held-out scenes by their edges and a caption that names their colours"
        f" only, guidance {evaluation['guidance']}: how well what is drawn covers what the edges enclose, the share of"
        " pictures in the scene's colours and no other, and the same of shapes-base alone, which is told the kinds."
        " Open captions are any held-out ones, each drawn by the edges of a scene that fulfils it, as the judge finds"
        " them:",
    ]
    names = list(evaluation["results"][0]["scores"])
    rows = [["steps", *(name.replace("_", " ") for name in names)]]
    for result in evaluation["results"]:
        rows.append([str(result["steps"]), *(f"{result['scores'][name]:.3f}" for name in names)])
    filled = [textwrap.fill(text, 120, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join(["# shapes-control", *filled, table(rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a trained ControlNet as the embedded one.")
    parser.add_argument("controlnet", type=Path, help="folder that sana-sprint train shapes_control wrote")
    parser.add_argument("--scores", type=Path, required=True, help="what sana-sprint evaluate --controlnet printed")
    options = parser.parse_args()
    # Before anything is removed.
    record = json.loads((options.controlnet / "training.json").read_text(encoding="utf-8"))
    card = model_card(record, json.loads(options.scores.read_text(encoding="utf-8")))
    replace_folder(DESTINATION, options.controlnet)
    (DESTINATION / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {DESTINATION}")


if __name__ == "__main__":
    main()
