"""SANA-Sprint 1.6B at 1024 pixels: one to four steps from a flow teacher, with the paper's settings.

Settings are those of arXiv 2503.09641, or of NVlabs' configuration where the paper does not say. Two are ours: AdamW
stands where they use CAME, at the same rates; and warm-ups count updates of the student, half of what they count, which
is the updates of student and discriminator together.
"""

from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.distillation import AngleDistribution, DistillationSettings
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.sprint import SprintRecipe

RECIPE = SprintRecipe(
    teacher="Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
    published="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    captions=CaptionChoice(temperature=0.1, threshold=25.0),
    loop=LoopSettings(
        steps=20_000,
        batch_size=512,
        accumulation=32,  # 16 examples at once on one GPU; with 32 processes, 1
        precision="bf16",
        ema_decay=0.999,  # theirs is switched off
        checkpoint_every=500,
        validate_every=500,
    ),
    distillation=DistillationSettings(
        student=OptimiserSettings(
            learning_rate=2e-6,
            warmup_steps=2500,
            schedule="constant",
            weight_decay=0.0,
            betas=(0.9, 0.999),
            clip_norm=0.1,
        ),
        # Theirs takes all of the student's settings but the warm-up.
        discriminator=OptimiserSettings(
            learning_rate=2e-6, warmup_steps=0, schedule="constant", weight_decay=0.0, betas=(0.9, 0.999), clip_norm=0.1
        ),
        sigma_data=0.5,
        student_angles=AngleDistribution(mean=0.0, std=1.6),  # 0.2 in NVlabs' configuration
        discriminator_angles=AngleDistribution(mean=-0.6, std=1.0),
        max_time_share=0.5,
        guidance_scales=(4.0, 4.5, 5.0),
        tangent_warmup_steps=2000,
        consistency_weight=1.0,
        adversarial_weight=0.5,
        head_blocks=(2, 8, 14, 19),
        misaligned_pairs=True,
        compile=False,  # excludes gradient checkpointing
    ),
)
