"""A recipe to what a dry run says: every setting, the size of each network, and the memory that each stage needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.evaluation.tables import aligned
from sana_sprint.sizes import readable_bytes

if TYPE_CHECKING:
    from sana_sprint.training.footprint import Footprint

_HEADING = ("network", "parameters", "weights", "gradients", "moments", "average")


def starting_config(recipe: Any) -> tuple[dict[str, Any], str]:
    """The config of the transformer that a recipe starts from, and where it is from; nothing is fetched.

    That of the folder that is named; where it names none, that of the published model of the size.
    """
    from sana_sprint.memory.configs import PUBLISHED
    from sana_sprint.training.fine_tuning import LoraRecipe
    from sana_sprint.training.origin import Origin
    from sana_sprint.training.recipes import shapes
    from sana_sprint.training.recipes.shapes_control import ShapesControlRecipe
    from sana_sprint.training.teacher import TeacherRecipe

    if isinstance(recipe, shapes.ShapesRecipe):
        return {}, "the recipe"
    is_distilled = isinstance(recipe, LoraRecipe)
    if is_distilled:
        name = recipe.model
    else:
        name = recipe.start if isinstance(recipe, TeacherRecipe) else recipe.teacher
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Origin.in_folder(folder).config(), str(folder)
    if isinstance(recipe, ShapesControlRecipe):
        return shapes.RECIPE.flow.config, f"the recipe shapes, for {name} is no folder here"
    return {
        **PUBLISHED[recipe.published],
        "guidance_embeds": is_distilled,
    }, f"{recipe.published}, for {name} is no folder here"


def table(found: "Footprint") -> list[str]:
    """The networks of a stage in lines, with what each takes."""
    rows: list[tuple[str, ...]] = [_HEADING]
    for name, network in found.networks.items():
        parts = (network.weights, network.gradients, network.moments, network.average)
        rows.append((name, f"{network.parameters:,}", *(readable_bytes(part) if part else "-" for part in parts)))
    return aligned(rows)


def report(recipe: Any) -> list[str]:
    """All lines of a dry run; the first ones, up to the empty line, are what `--set` takes back."""
    from sana_sprint.training.recipes.overrides import lines_of
    from sana_sprint.training.rehearsal import rehearse

    config, source = starting_config(recipe)
    lines = [*lines_of(recipe), "", f"Memory of one process that holds everything, with the networks of {source}:"]
    for stage, found in rehearse(recipe, config).items():
        lines += ["", f"{stage}, {found.examples} examples at once", *table(found)]
        lines.append(f"kept of a micro-step for its gradients, estimated: {readable_bytes(found.activations)}")
        lines.append(f"all of it: {readable_bytes(found.total)}")
    return lines
