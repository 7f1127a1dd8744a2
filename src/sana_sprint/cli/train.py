"""`sana-sprint train`: a recipe's name and a folder in; a trained checkpoint in that folder out."""

import argparse
from pathlib import Path

from sana_sprint.cli import screen

# Those of training.shapes, which `--help` must not import.
STAGES = ("autoencoder", "decoder", "language", "flow", "guidance", "assemble")

# What a trial of the recipe takes instead: seconds, and a model that draws nothing.
_TRIAL_STEPS, _TRIAL_PICTURES = 2, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("recipe", choices=("shapes",), help="what to train: shapes is the embedded checkpoint")
    parser.add_argument(
        "--stage",
        dest="stages",
        action="append",
        choices=STAGES,
        help="run this stage only, on the results of those before it; may be given several times (all, in order)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs") / "shapes",
        metavar="DIR",
        help="where results and logs go; a run that stopped goes on from what is there (%(default)s)",
    )
    parser.add_argument(
        "--start-from",
        metavar="CHECKPOINT",
        help="go on from a checkpoint of this recipe, such as embedded: its autoencoder and its language model are"
        " kept, its transformer is trained further (none: train everything)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, .. (%(default)s)")
    parser.add_argument(
        "--trial", action="store_true", help=f"{_TRIAL_STEPS} steps a stage: shows that everything runs, nothing more"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains the stages asked for and prints where the result lies."""
    with screen.quiet_libraries():
        from sana_sprint.cli.model import choose_device, find_model
        from sana_sprint.training.shapes import ShapesRecipe, ShapesTraining, shortened

        recipe = ShapesRecipe()
        if options.trial:
            recipe = shortened(recipe, steps=_TRIAL_STEPS, num_pictures=_TRIAL_PICTURES)
        stages = options.stages or STAGES
        start = find_model(options.start_from).folder if options.start_from else None
        checkpoint = ShapesTraining(options.output, recipe, choose_device(options.device), start).run(stages)
    if "assemble" in stages:
        print(f"wrote {checkpoint}; draw with: sana-sprint generate PROMPT --model {checkpoint}")
    else:
        print(f"wrote {', '.join(stages)} below {options.output}")
