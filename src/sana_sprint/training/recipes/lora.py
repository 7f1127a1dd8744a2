"""A LoRA for SANA-Sprint 0.6B from a few pictures, by the loss that keeps its few steps.

No run at full size has chosen these settings; a small model's are in `scripts/teach_a_shape.py`.
"""

from sana_sprint.training.fine_tuning import LoraRecipe
from sana_sprint.training.lora import LoraSettings
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings

RECIPE = LoraRecipe(
    model="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    published="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    loop=LoopSettings(
        steps=500,
        batch_size=8,
        accumulation=8,  # one example at once, and one of the prior
        precision="bf16",
        ema_decay=0.99,
        checkpoint_every=100,
        log_every=10,
        validate_every=100,
    ),
    lora=LoraSettings(
        optimiser=OptimiserSettings(learning_rate=2e-4, warmup_steps=20, schedule="constant", weight_decay=0.0),
    ),
)
