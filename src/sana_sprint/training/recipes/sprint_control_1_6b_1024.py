"""A ControlNet for SANA-Sprint 1.6B at 1024 pixels: the second of the paper's two stages.

It is distilled as the model itself was (arXiv 2503.09641, section 3.4), so all settings are those of the 1.6B model.
"""

from sana_sprint.training.control_sprint import SprintControlRecipe
from sana_sprint.training.recipes import control_1_6b_1024, sprint_1_6b_1024

RECIPE = SprintControlRecipe(
    teacher=sprint_1_6b_1024.RECIPE.teacher,
    control="runs/control_1.6b_1024/controlnet",
    student=sprint_1_6b_1024.RECIPE.published,
    published=sprint_1_6b_1024.RECIPE.published,
    captions=sprint_1_6b_1024.RECIPE.captions,
    num_layers=control_1_6b_1024.RECIPE.num_layers,
    loop=sprint_1_6b_1024.RECIPE.loop,
    distillation=sprint_1_6b_1024.RECIPE.distillation,
)
