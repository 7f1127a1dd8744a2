"""The embedded checkpoint: every stage of it, from pictures of drawn shapes; hours on two CPU cores."""

from dataclasses import dataclass, field, replace

from sana_sprint.training.autoencoder import AutoencoderSettings
from sana_sprint.training.distillation import AngleDistribution, DistillationSettings
from sana_sprint.training.flow import FlowSettings
from sana_sprint.training.language import LanguageSettings
from sana_sprint.training.optimiser import OptimiserSettings
from sana_sprint.training.settings import LoopSettings

# Width of the text features, and so of the captions the transformer reads.
_TEXT_WIDTH = 128
_LATENT_CHANNELS = 16
_STAGE_WIDTHS = (32, 48, 96, 128)


def _autoencoder_settings() -> AutoencoderSettings:
    config = {
        "latent_channels": _LATENT_CHANNELS,
        "encoder_block_out_channels": _STAGE_WIDTHS,
        "decoder_block_out_channels": _STAGE_WIDTHS,
        # No blocks at full resolution: stem and head resample instead, which is where most of the time would go.
        "encoder_layers_per_block": (0, 1, 1, 1),
        "decoder_layers_per_block": (0, 2, 2, 2),
        "encoder_qkv_multiscales": ((), (), (), ()),
        "decoder_qkv_multiscales": ((), (), (), ()),
        "decoder_conv_act_fn": "silu",
    }
    loop = LoopSettings(steps=5000, batch_size=32, ema_decay=0.998, seed=11)
    optimiser = OptimiserSettings(learning_rate=1e-3, warmup_steps=300, weight_decay=0.0)
    return AutoencoderSettings(
        config=config,
        loop=loop,
        optimiser=optimiser,
        decoder_loop=replace(loop, steps=4000, seed=15),
        decoder_optimiser=replace(optimiser, learning_rate=5e-4, warmup_steps=100),
        # 0.23 MB in the place of 1.12 MB: most of the room that the student's sixth block takes in the 12 MB.
        encoder_config={"encoder_block_out_channels": (32, 32, 64, 64), "encoder_layers_per_block": (0, 1, 1, 0)},
        encoder_loop=replace(loop, steps=4000, batch_size=64, seed=16),
        encoder_optimiser=replace(optimiser, learning_rate=2e-3, warmup_steps=100),
    )


def _language_settings() -> LanguageSettings:
    config = {
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 1024,
        "sliding_window": 1024,
        # The attention kernels that transformers may choose treat the cap differently; without it they agree.
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    return LanguageSettings(
        vocabulary_size=1024,
        config=config,
        loop=LoopSettings(steps=2400, batch_size=64, ema_decay=0.99, seed=12),
        optimiser=OptimiserSettings(learning_rate=2e-3, warmup_steps=100),
    )


def _flow_settings() -> FlowSettings:
    config = {
        "in_channels": _LATENT_CHANNELS,
        "out_channels": _LATENT_CHANNELS,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "num_layers": 5,
        "num_cross_attention_heads": 6,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 192,
        "caption_channels": _TEXT_WIDTH,
        # 2.5 in the published models; with 2, and the small encoder, the whole checkpoint stays below 12 MB.
        "mlp_ratio": 2.0,
        "sample_size": 8,
        "interpolation_scale": 1.0,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
    }
    return FlowSettings(
        config=config,
        loop=LoopSettings(steps=10_000, batch_size=64, seed=13),
        optimiser=OptimiserSettings(learning_rate=1e-3, warmup_steps=300),
        guidance_loop=LoopSettings(steps=900, batch_size=64, ema_decay=0.995, seed=14),
        guidance_optimiser=OptimiserSettings(learning_rate=3e-4, matrix_learning_rate=6e-4, warmup_steps=50),
    )


def _consistency_settings() -> DistillationSettings:
    optimiser = OptimiserSettings(
        learning_rate=4e-4, matrix_learning_rate=1.2e-3, warmup_steps=50, weight_decay=0.0, clip_norm=1.0
    )
    # LADD costs as much again as sCM, and gains nothing beside it in the steps that two CPU cores allow:
    # docs/training.md.
    return DistillationSettings(
        student=optimiser,
        discriminator=replace(optimiser, learning_rate=1e-3, betas=(0.5, 0.99), clip_norm=10.0, schedule="constant"),
        head_blocks=(0, 2, 4),
        max_time_share=0.0,
        tangent_warmup_steps=100,
        adversarial_weight=0.0,
        use_muon=True,
    )


def _distillation_settings() -> DistillationSettings:
    settings = _consistency_settings()
    return replace(
        settings,
        student=replace(settings.student, learning_rate=3e-4, matrix_learning_rate=9e-4),
        fake_score=replace(settings.student, learning_rate=5e-4, matrix_learning_rate=1.2e-3),
        # Where the later ones of two to four steps begin.
        student_angles=AngleDistribution(mean=0.5, std=1.0),
        max_time_share=0.6,
        consistency_weight=0.0,
        matching_weight=1.0,
    )


def _adversarial_settings() -> DistillationSettings:
    settings = _distillation_settings()
    return replace(
        settings,
        # The heads are new, and have to know something before the student learns from them.
        student=replace(settings.student, warmup_steps=150),
        discriminator=replace(settings.discriminator, warmup_steps=20),
        adversarial_weight=0.5,
    )


def at_constant_rates(settings: DistillationSettings) -> DistillationSettings:
    """The mean rates of the cosine, throughout: a slow average does what their fall would do."""

    def half(peak: OptimiserSettings) -> OptimiserSettings:
        rates = {name: getattr(peak, name) / 2 for name in ("learning_rate", "matrix_learning_rate")}
        return replace(peak, **rates, schedule="constant")

    return replace(settings, student=half(settings.student), fake_score=half(settings.fake_score))


def _one_step_settings() -> DistillationSettings:
    # With five blocks, later steps lose nothing by what they are not taught here.
    return replace(at_constant_rates(_adversarial_settings()), max_time_share=1.0)


def _matching_settings() -> DistillationSettings:
    # LADD's gradient is three times as long as that of matching, and most of it is noise: docs/training.md.
    return replace(_one_step_settings(), adversarial_weight=0.0, matching_noisings=2)


def _several_steps_settings() -> DistillationSettings:
    # A deeper student forgets the later steps that it is not shown, and by matching alone what is less likely.
    return replace(_one_step_settings(), max_time_share=0.6, student_angles=AngleDistribution(mean=0.2, std=1.0))


@dataclass(frozen=True, kw_only=True)
class ShapesRecipe:
    """All settings: those of the embedded checkpoint's last round, whose last stages were run more often, by hand.

    Those of `encoder` and `expansion` are what was run; of `several_steps`, what the runs showed: docs/training.md.
    """

    picture_size: int = 64
    num_pictures: int = 60_000
    pool_seed: int = 1
    max_caption_tokens: int = 32
    autoencoder: AutoencoderSettings = field(default_factory=_autoencoder_settings)
    language: LanguageSettings = field(default_factory=_language_settings)
    flow: FlowSettings = field(default_factory=_flow_settings)
    consistency: DistillationSettings = field(default_factory=_consistency_settings)
    consistency_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=1500, batch_size=64, ema_decay=0.995, seed=20)
    )
    distillation: DistillationSettings = field(default_factory=_distillation_settings)
    distillation_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=3000, batch_size=64, ema_decay=0.995, seed=21)
    )
    adversarial: DistillationSettings = field(default_factory=_adversarial_settings)
    adversarial_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=2200, batch_size=64, ema_decay=0.995, seed=33)
    )
    one_step: DistillationSettings = field(default_factory=_one_step_settings)
    one_step_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=1600, batch_size=64, ema_decay=0.9996, ema_warmup=False, seed=51)
    )
    matching: DistillationSettings = field(default_factory=_matching_settings)
    matching_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=1600, batch_size=64, ema_decay=0.9992, ema_warmup=False, seed=101)
    )
    # The student's blocks from the stage `expansion` on. A teacher that began from such a student has as many itself.
    student_layers: int = 6
    expansion: DistillationSettings = field(default_factory=_matching_settings)
    expansion_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=2400, batch_size=64, ema_decay=0.9992, ema_warmup=False, seed=221)
    )
    several_steps: DistillationSettings = field(default_factory=_several_steps_settings)
    several_steps_loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=1200, batch_size=64, ema_decay=0.998, ema_warmup=False, seed=261)
    )
    # Of what the assembled student is shown. Below 1 it begins with less noise than it was taught, which is likelier to
    # be drawn right and varies less ("truncation"; Brock et al., arXiv 1809.11096): docs/training.md.
    input_scale: float = 0.92


RECIPE = ShapesRecipe()


def shortened(recipe: ShapesRecipe, steps: int, num_pictures: int, batch_size: int = 8) -> ShapesRecipe:
    """The same recipe with so few steps, on so few pictures, that it shows that everything runs, and nothing more."""

    def fewer(settings: LoopSettings) -> LoopSettings:
        return replace(settings, steps=steps, batch_size=batch_size)

    def at_once(settings: OptimiserSettings) -> OptimiserSettings:
        return replace(settings, warmup_steps=1)

    def briefly(settings: DistillationSettings) -> DistillationSettings:
        student, fake_score = at_once(settings.student), at_once(settings.fake_score)
        discriminator = at_once(settings.discriminator)
        return replace(settings, student=student, fake_score=fake_score, discriminator=discriminator, compile=False)

    autoencoder, language, flow = recipe.autoencoder, recipe.language, recipe.flow
    return replace(
        recipe,
        num_pictures=num_pictures,
        autoencoder=replace(
            autoencoder,
            loop=fewer(autoencoder.loop),
            optimiser=at_once(autoencoder.optimiser),
            decoder_loop=fewer(autoencoder.decoder_loop),
            decoder_optimiser=at_once(autoencoder.decoder_optimiser),
            encoder_loop=fewer(autoencoder.encoder_loop),
            encoder_optimiser=at_once(autoencoder.encoder_optimiser),
            compile=False,
        ),
        language=replace(language, loop=fewer(language.loop), optimiser=at_once(language.optimiser)),
        flow=replace(
            flow,
            loop=fewer(flow.loop),
            optimiser=at_once(flow.optimiser),
            guidance_loop=fewer(flow.guidance_loop),
            guidance_optimiser=at_once(flow.guidance_optimiser),
            compile=False,
        ),
        consistency=briefly(recipe.consistency),
        consistency_loop=fewer(recipe.consistency_loop),
        distillation=briefly(recipe.distillation),
        distillation_loop=fewer(recipe.distillation_loop),
        adversarial=briefly(recipe.adversarial),
        adversarial_loop=fewer(recipe.adversarial_loop),
        one_step=briefly(recipe.one_step),
        one_step_loop=fewer(recipe.one_step_loop),
        matching=briefly(recipe.matching),
        matching_loop=fewer(recipe.matching_loop),
        expansion=briefly(recipe.expansion),
        expansion_loop=fewer(recipe.expansion_loop),
        several_steps=briefly(recipe.several_steps),
        several_steps_loop=fewer(recipe.several_steps_loop),
    )
