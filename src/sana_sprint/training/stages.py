"""The stages of the shapes recipe: alone, so that `--help` names them without importing what runs them."""

STAGES = (
    "autoencoder",
    "decoder",
    "encoder",
    "language",
    "flow",
    "guidance",
    "consistency",
    "distillation",
    "adversarial",
    "one_step",
    "matching",
    "expansion",
    "several_steps",
    "assemble",
)
