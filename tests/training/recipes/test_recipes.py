"""Recipes by their names, and what they say of the published training."""

import math

import pytest
import torch

from sana_sprint.training.distillation import DistillationSettings
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import draw_times
from sana_sprint.training.recipes import NAMES, find_recipe, recipe_name
from sana_sprint.training.recipes.overrides import settings_of


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_found_with_dots_dashes_and_underscores(name):
    recipe = find_recipe(name)
    for spelling in (name.replace(".", "_"), name.replace("_", "-"), name.upper()):
        assert find_recipe(spelling) is recipe
        assert recipe_name(spelling) == name


def test_what_is_no_recipe_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no recipe 'sprint': choose from shapes, shapes_control, .*sprint_1.6b"):
        recipe_name("sprint")


@pytest.mark.parametrize("kind", ["sprint", "teacher"])
def test_the_two_sizes_differ_in_their_models_alone(kind):
    small, large = (settings_of(find_recipe(f"{kind}_{size}_1024")) for size in ("0.6b", "1.6b"))
    assert {name for name in small if small[name] != large[name]} == {
        "teacher" if kind == "sprint" else "start",
        "published",
    }


def test_the_defaults_of_the_objective_are_those_of_the_published_recipe():
    recipe = find_recipe("sprint_1.6b_1024").distillation
    defaults = settings_of(DistillationSettings(student=recipe.student, discriminator=recipe.discriminator))
    assert settings_of(recipe) == {**defaults, "compile": False}


def test_the_times_of_a_teacher_are_a_shifted_logit_normal():
    draws = Draws.of_step(0, 0, 500)
    time = draws.normal().sigmoid()
    again = Draws.of_step(0, 0, 500)
    recipe = find_recipe("teacher_1.6b_1024")
    # As published: the logistic of a standard normal, then shifted by 3.
    torch.testing.assert_close(draw_times(again, recipe.flow.time_mean), 3 * time / (1 + 2 * time))
    assert recipe.flow.time_mean == math.log(3)


def test_a_control_net_is_distilled_with_the_settings_of_its_model():
    sprint, control = find_recipe("sprint_1.6b_1024"), find_recipe("sprint_control_1.6b_1024")
    assert (control.distillation, control.loop, control.teacher) == (sprint.distillation, sprint.loop, sprint.teacher)
    assert control.student == sprint.published
    assert find_recipe("control_1.6b_1024").teacher == sprint.teacher
