"""A teacher for SANA-Sprint 0.6B at 1024 pixels: SANA, taught a time in [0, 1] and normalised queries and keys.

Without these two the derivative that distillation needs explodes. Settings are those of arXiv 2503.09641 (section 4.1
and appendix F), or of NVlabs' configuration where the paper does not say; AdamW stands where they use CAME.
"""

import math

from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.flow import FlowMatchingSettings
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.teacher import TeacherRecipe

RECIPE = TeacherRecipe(
    start="Efficient-Large-Model/Sana_600M_1024px_diffusers",
    published="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    captions=CaptionChoice(temperature=0.1, threshold=25.0),
    loop=LoopSettings(
        steps=5000,
        batch_size=1024,
        accumulation=64,  # 16 examples at once on one GPU; with 64 processes, 1
        precision="bf16",
        ema_decay=0.999,  # theirs is switched off
        checkpoint_every=500,
        validate_every=500,
    ),
    flow=FlowMatchingSettings(
        optimiser=OptimiserSettings(
            learning_rate=2e-5,  # 1e-4 in NVlabs' configuration
            warmup_steps=2000,
            schedule="constant",
            weight_decay=0.0,
            betas=(0.9, 0.999),
            clip_norm=0.1,
        ),
        caption_dropout=0.1,
        time_mean=math.log(3.0),  # a logit-normal of mean 0, shifted by 3 s / (1 + 2 s)
        use_muon=False,
        compile=False,
    ),
)
