"""SANA-Sprint 0.6B at 1024 pixels: the settings of the 1.6B model, from its own teacher, as in the paper."""

from dataclasses import replace

from sana_sprint.training.recipes import sprint_1_6b_1024

RECIPE = replace(
    sprint_1_6b_1024.RECIPE,
    teacher="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers",
    published="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
)
