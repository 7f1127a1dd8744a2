"""A recipe's name to its settings."""

from importlib import import_module
from typing import Any

NAMES = (
    "shapes",
    "shapes_control",
    "teacher_0.6b_1024",
    "teacher_1.6b_1024",
    "sprint_0.6b_1024",
    "sprint_1.6b_1024",
    "control_1.6b_1024",
    "sprint_control_1.6b_1024",
    "lora",
)


def recipe_name(text: str) -> str:
    """One of `NAMES`; dots and dashes count as underscores, and capitals as small letters.

    Raises:
        ValueError: if there is no such recipe.
    """
    found = next((name for name in NAMES if _module(name) == _module(text)), None)
    if found is None:
        raise ValueError(f"no recipe {text!r}: choose from {', '.join(NAMES)}")
    return found


def find_recipe(text: str) -> Any:
    """The settings of a recipe by its name: a `ShapesRecipe`, `TeacherRecipe`, `SprintRecipe`, `LoraRecipe`, ..

    Raises:
        ValueError: if there is no such recipe.
    """
    return import_module(f"{__name__}.{_module(recipe_name(text))}").RECIPE


def _module(name: str) -> str:
    return name.lower().replace(".", "_").replace("-", "_")
