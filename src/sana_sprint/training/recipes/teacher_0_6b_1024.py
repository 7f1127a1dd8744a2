"""A teacher for SANA-Sprint 0.6B at 1024 pixels: the settings of the 1.6B one, from SANA 0.6B."""

from dataclasses import replace

from sana_sprint.training.recipes import teacher_1_6b_1024

RECIPE = replace(
    teacher_1_6b_1024.RECIPE,
    start="Efficient-Large-Model/Sana_600M_1024px_diffusers",
    published="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
)
