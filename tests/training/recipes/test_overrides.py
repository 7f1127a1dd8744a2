"""Settings of a recipe as text: every kind of value, and what is said of a key or a value that is none."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sana_sprint.training.recipes import NAMES, find_recipe
from sana_sprint.training.recipes.overrides import lines_of, override, settings_of


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 3
    rate: float = 0.5
    pair: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str = "first"
    is_fast: bool = False
    kind: Literal["cosine", "constant"] = "cosine"
    data: Path | None = None
    blocks: tuple[int, ...] = (0, 2)
    prompts: tuple[str, ...] = ("a cat, red", "a dog")
    inner: Inner = Inner()
    config: dict[str, Any] = field(
        default_factory=lambda: {"width": 8, "scales": ((), (5,)), "cap": None, "act": "silu"}
    )


RECIPE = Recipe()


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("name=second one", "name", "second one"),
        ("name=a=b", "name", "a=b"),
        ("is_fast=true", "is_fast", True),
        ("is_fast=False", "is_fast", False),
        ("kind=constant", "kind", "constant"),
        ("data=some/where", "data", Path("some/where")),
        ("data=none", "data", None),
        ("blocks=1,3,4", "blocks", (1, 3, 4)),
        ("blocks=(1,)", "blocks", (1,)),
        ("blocks=(1)", "blocks", (1,)),
        ("blocks=[]", "blocks", ()),
        ("blocks=7", "blocks", (7,)),
        ("blocks=()", "blocks", ()),
        ("prompts=('a, b', 'c')", "prompts", ("a, b", "c")),
        ("prompts=('a, b')", "prompts", ("a, b",)),
        ("prompts=", "prompts", ()),
        ("inner.steps=20_000", "inner.steps", 20_000),
        ("inner.rate=2e-6", "inner.rate", 2e-6),
        ("inner.rate=1", "inner.rate", 1.0),
        ("inner.pair=0.5,0.9", "inner.pair", (0.5, 0.9)),
        (" inner.steps = 4 ", "inner.steps", 4),
        ("config.width=16", "config.width", 16),
        ("config.scales=((3,), ())", "config.scales", ((3,), ())),
        ("config.cap=50.0", "config.cap", 50.0),
        ("config.act=relu", "config.act", "relu"),
    ],
)
def test_a_setting_is_changed_and_no_other(assignment, key, value):
    changed = settings_of(override(RECIPE, [assignment]))
    assert changed == {**settings_of(RECIPE), key: value}
    assert type(changed[key]) is type(value)


def test_several_settings_are_changed_at_once_and_the_last_of_a_key_counts():
    changed = override(RECIPE, ["inner.steps=5", "name=x", "inner.steps=6", "config.width=1"])
    assert (changed.inner.steps, changed.name, changed.config["width"]) == (6, "x", 1)
    assert Recipe() == RECIPE


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.stesp=1", "there is no setting 'inner.stesp'; the nearest is 'inner.steps'"),
        ("config.widht=1", "there is no setting 'config.widht'; the nearest is 'config.width'"),
        ("inner=1", "there is no setting 'inner': it is a group of settings, such as inner.steps"),
        ("inner.steps", "a setting is given as key=value, got 'inner.steps'"),
        ("inner.steps=1.5", "inner.steps must be a whole number, got '1.5'"),
        ("inner.rate=fast", "inner.rate must be a number, got 'fast'"),
        ("is_fast=1", "is_fast must be true or false, got '1'"),
        ("kind=linear", "kind must be one of cosine, constant, got 'linear'"),
        ("blocks=1,x", "blocks must be any number of values separated by commas, each a whole number, got '1,x'"),
        ("blocks=(1.5,)", "blocks must be any number of values separated by commas, each a whole number, got"),
        ("blocks=(1", "blocks must be any number of values separated by commas, each a whole number, got"),
        ("inner.pair=1", "inner.pair must be 2 values separated by commas, each a number, got '1'"),
        ("config.width=wide", "config.width must be a whole number, got 'wide'"),
        ("config.scales=f(1)", "config.scales must be none, or a value as Python writes it, got 'f(1)'"),
        ("inner.steps=-1", "steps must not be negative, got -1"),
    ],
)
def test_what_cannot_be_set_is_refused_with_what_can(assignment, message):
    with pytest.raises(ValueError) as refusal:
        override(RECIPE, [assignment])
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_of_a_recipe_are_taken_back(name):
    recipe = find_recipe(name)
    lines = lines_of(recipe)
    assert override(recipe, lines) == recipe
    seed = next(key for key in settings_of(recipe) if key.endswith(".seed"))
    changed = override(recipe, [f"{seed}=7"])
    assert changed != recipe
    assert override(changed, lines) == recipe
    assert override(recipe, lines_of(changed)) == changed
