"""`sana-sprint train`: a recipe's name and a folder in; a trained checkpoint or LoRA in that folder out."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.training.recipes import NAMES, find_recipe, recipe_name
from sana_sprint.training.stages import STAGES

if TYPE_CHECKING:
    import torch

# What a trial of the recipe takes instead: seconds, and a model that draws nothing.
_TRIAL_STEPS, _TRIAL_PICTURES = 2, 64


def _recipe(text: str) -> str:
    try:
        return recipe_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "recipe",
        type=_recipe,
        metavar="RECIPE",
        help=f"what to train: shapes is the embedded checkpoint; one of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="another value for settings of the recipe, such as loop.steps=1000; --dry-run lists them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print all settings, the size of each network and the memory that is needed, and train nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where results and logs go; a run that stopped goes on from what is there (runs/RECIPE)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, .. (cpu for shapes and shapes_control, else auto)")
    shapes = parser.add_argument_group("of the recipe shapes alone")
    shapes.add_argument(
        "--stage",
        dest="stages",
        action="append",
        choices=STAGES,
        help="run this stage only, on the results of those before it; may be given several times (all, in order)",
    )
    shapes.add_argument(
        "--start-from",
        metavar="CHECKPOINT",
        help="go on from a checkpoint of this recipe, such as embedded: its autoencoder and its language model are"
        " kept, its transformer is trained further (none: train everything)",
    )
    shapes.add_argument(
        "--trial",
        action="store_true",
        help=f"{_TRIAL_STEPS} steps a stage: shows that everything runs, nothing more; of shapes_control too",
    )
    parser.set_defaults(run=run)


def _resolved(options: argparse.Namespace) -> Any:
    """The recipe with the settings asked for."""
    from sana_sprint.training.recipes import shapes, shapes_control
    from sana_sprint.training.recipes.overrides import override

    recipe = find_recipe(options.recipe)
    if options.trial:
        module: Any = shapes if options.recipe == "shapes" else shapes_control
        recipe = module.shortened(recipe, steps=_TRIAL_STEPS, num_pictures=_TRIAL_PICTURES)
    return override(recipe, options.assignments)


def _check_options(options: argparse.Namespace) -> None:
    given = {"--stage": options.stages, "--start-from": options.start_from}
    for name, value in given.items():
        if value and options.recipe != "shapes":
            raise ValueError(f"{name} is for the recipe shapes, got {options.recipe}")
    if options.trial and not options.recipe.startswith("shapes"):
        raise ValueError(f"--trial is for the recipes shapes and shapes_control, got {options.recipe}")


def _train_shapes(recipe: Any, options: argparse.Namespace, output: Path, device: "torch.device") -> str:
    from sana_sprint.cli.model import find_model
    from sana_sprint.training.shapes import ShapesTraining

    stages = options.stages or STAGES
    start = find_model(options.start_from).folder if options.start_from else None
    checkpoint = ShapesTraining(output, recipe, device, start).run(stages)
    if "assemble" in stages:
        return f"wrote {checkpoint}; draw with: sana-sprint generate PROMPT --model {checkpoint}"
    return f"wrote {', '.join(stages)} below {output}"


def _train_shapes_control(recipe: Any, output: Path, device: "torch.device") -> str:
    from sana_sprint.cli.model import find_model
    from sana_sprint.training.origin import Origin
    from sana_sprint.training.shapes_control import ShapesControlTraining

    teacher, student = Origin.find(recipe.teacher), find_model(recipe.student).folder
    folder = ShapesControlTraining(output, recipe, teacher, student, device).run()
    return f"wrote {folder}, a ControlNet for {recipe.student}"


def _train_large(recipe: Any, output: Path, device: "torch.device") -> str:
    """Trains a teacher, a Sprint model, or adapters or a ControlNet for one."""
    from sana_sprint.cli.progress_pictures import progress_pictures
    from sana_sprint.training.control_sprint import SprintControlRecipe, train_sprint_control
    from sana_sprint.training.control_teacher import ControlRecipe, train_control_teacher
    from sana_sprint.training.fine_tuning import LoraRecipe, train_lora
    from sana_sprint.training.origin import Origin
    from sana_sprint.training.sprint import SprintRecipe, train_sprint
    from sana_sprint.training.teacher import train_teacher

    if isinstance(recipe, LoraRecipe):
        origin = Origin.find(recipe.model)
        pictures = progress_pictures(origin.pipeline, recipe.prompts, output, device, has_guidance=True)
        folder = train_lora(recipe, origin, output, device, pictures)
        return f"wrote {folder}; load it with: pipe.load_lora_weights({str(folder)!r})"
    if isinstance(recipe, ControlRecipe):
        checkpoint = train_control_teacher(recipe, Origin.find(recipe.teacher), output, device)
    elif isinstance(recipe, SprintControlRecipe):
        checkpoint = train_sprint_control(recipe, output, device)
    elif isinstance(recipe, SprintRecipe):
        origin = Origin.find(recipe.teacher)
        pictures = progress_pictures(origin.pipeline, recipe.prompts, output, device, has_guidance=True)
        checkpoint = train_sprint(recipe, origin, output, device, pictures)
    else:
        origin = Origin.find(recipe.start)
        pictures = progress_pictures(origin.pipeline, recipe.prompts, output, device, has_guidance=False)
        checkpoint = train_teacher(recipe, origin, output, device, pictures)
    return f"wrote {checkpoint}"


def run(options: argparse.Namespace) -> None:
    """Trains, and prints where the result lies; or prints what a dry run says."""
    _check_options(options)
    with screen.quiet_libraries():
        recipe = _resolved(options)
        if options.dry_run:
            from sana_sprint.cli.dry_run import report

            print("\n".join(report(recipe)))
            return
        import diffusers
        import transformers
        from accelerate import PartialState

        from sana_sprint.cli.model import choose_device

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        is_shapes = options.recipe.startswith("shapes")
        device = choose_device(options.device or ("cpu" if is_shapes else "auto"))
        output = options.output or Path("runs") / options.recipe
        if options.recipe == "shapes":
            wrote = _train_shapes(recipe, options, output, device)
        elif options.recipe == "shapes_control":
            wrote = _train_shapes_control(recipe, output, device)
        else:
            wrote = _train_large(recipe, output, device)
        if PartialState().is_main_process:
            print(wrote)
