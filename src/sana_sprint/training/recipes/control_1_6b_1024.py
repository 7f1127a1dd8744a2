"""A ControlNet for the teacher of SANA-Sprint 1.6B at 1024 pixels: the first of the paper's two stages.

arXiv 2503.09641 (section 3.4) says the objective and the size alone. The network is that of SANA's ControlNet by
NVlabs, and so is the dropout of captions; rate, length and batch are ours, those of the teacher's own training.
"""

from sana_sprint.training.control_teacher import ControlRecipe
from sana_sprint.training.recipes import sprint_1_6b_1024, teacher_1_6b_1024

RECIPE = ControlRecipe(
    teacher=sprint_1_6b_1024.RECIPE.teacher,
    published=sprint_1_6b_1024.RECIPE.published,
    captions=sprint_1_6b_1024.RECIPE.captions,
    num_layers=7,
    residual_placement="before",
    loop=teacher_1_6b_1024.RECIPE.loop,
    flow=teacher_1_6b_1024.RECIPE.flow,
)
