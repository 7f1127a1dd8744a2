"""A flow transformer to one that needs one to four steps: consistency, adversarial and distribution matching losses.

SANA-Sprint's distillation (arXiv 2503.09641, Algorithm 2): sCM makes what the student predicts the same all along the
teacher's path, LADD makes it look real. Distribution matching, which is not the paper's, makes it as likely as the
teacher's. Where paper and public code differ, docs/training.md says what was chosen.

B batch, C channels, h w latent grid. Latents have unit variance; angles are TrigFlow's, in radians.
"""

import copy
import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sana_sprint.layers.embeddings import NUM_TIME_FEATURES, ScalarEmbedder, sinusoidal_features
from sana_sprint.training.adversarial import (
    Discriminator,
    block_features,
    discriminator_loss,
    frozen,
    generator_loss,
    gradient_penalty,
)
from sana_sprint.training.datasets.source import LatentBatch, LatentSource
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import N, block_matrices, embeds_guidance, predict_velocity, use_training_kernels
from sana_sprint.training.loop import Objective
from sana_sprint.training.matching import matching_loss
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import ControlSamples
from sana_sprint.transformer.trunk import SanaTrunk
from sana_sprint.trigflow.bridge import flow_time, trigflow_velocity
from sana_sprint.trigflow.consistency import (
    consistency_loss,
    consistency_tangent,
    draw_angles,
    velocity_and_derivative,
    warmup_share,
)
from sana_sprint.trigflow.path import add_noise, cosine_and_sine, predict_clean, velocity_target


@dataclass(frozen=True, kw_only=True)
class AngleDistribution:
    """Angles arctan(exp(N(mean, std)) / sigma_data)."""

    mean: float
    std: float

    def draw(self, draws: Draws, sigma_data: float) -> torch.Tensor:
        return draw_angles(draws.normal(), self.mean, self.std, sigma_data)


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """The objective. Defaults are the paper's for 1024 px, where it says them."""

    student: OptimiserSettings
    discriminator: OptimiserSettings
    # Of the log-variance alone, which has to follow the size of the loss faster than the student changes it.
    log_variance_rate: float = 1e-3
    sigma_data: float = 0.5  # shifts the angles only: all networks see unit variance
    student_angles: AngleDistribution = field(default_factory=lambda: AngleDistribution(mean=0.0, std=1.6))
    discriminator_angles: AngleDistribution = field(default_factory=lambda: AngleDistribution(mean=-0.6, std=1.0))
    # Share of the examples that start from pure noise, where consistency teaches nothing and one step is decided.
    max_time_share: float = 0.5
    # Share of the others whose latents are not the data's, but what the student draws from pure noise in one step: what
    # the later one of two steps sees when it draws.
    simulated_share: float = 0.0
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    tangent_warmup_steps: int = 2000  # updates of the student; 4000 of the public code, which counts both networks'
    # A loss of weight 0 costs nothing.
    consistency_weight: float = 1.0  # sCM
    adversarial_weight: float = 0.5  # LADD
    matching_weight: float = 0.0  # distribution matching, which is not the paper's
    # Squared error to the data's latents. Where much is left open it blurs; where a drawing says it all it is right. Of
    # what begins at the student's own latents, a later step learns by it to mend what an earlier one got wrong.
    reconstruction_weight: float = 0.0
    head_blocks: tuple[int, ...] = (2, 8, 14, 19)
    misaligned_pairs: bool = True
    gradient_penalty: float = 0.0  # R1 on the heads' inputs
    # Of the network that learns the score of the student's latents, faster than the student changes them.
    fake_score: OptimiserSettings = field(default_factory=lambda: OptimiserSettings(learning_rate=1e-5))
    matching_angles: AngleDistribution = field(default_factory=lambda: AngleDistribution(mean=0.0, std=1.6))
    # How often the student's latents of one example are noised: on the shapes world, two thirds of the variance of
    # matching's gradient are the noising's.
    matching_noisings: int = 1
    # For the matrices of the blocks of both that are transformers, which must be whole then: no FSDP.
    use_muon: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        weights = ("consistency_weight", "adversarial_weight", "matching_weight", "reconstruction_weight")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0: there is nothing to learn")
        if not 0 <= self.max_time_share < 1 and self.consistency_weight:
            raise ValueError(f"max_time_share must lie in [0, 1) for a consistency loss, got {self.max_time_share}")
        if self.tangent_warmup_steps < 0:
            raise ValueError(f"tangent_warmup_steps must be 0 or more, got {self.tangent_warmup_steps}")
        if not 0 <= self.simulated_share <= 1:
            raise ValueError(f"simulated_share must lie in [0, 1], got {self.simulated_share}")
        if self.matching_noisings < 1:
            raise ValueError(f"matching_noisings must be 1 or more, got {self.matching_noisings}")
        if list(self.head_blocks) != sorted(set(self.head_blocks)):
            raise ValueError(f"head_blocks must ascend, got {self.head_blocks}")


# Most are compared as settings of the groups; compiled or not, a run goes on.
_NOT_OF_THE_LOSSES = ("student", "discriminator", "fake_score", "log_variance_rate", "compile")


class LogVariance(nn.Module):
    """The logarithm of how large the consistency loss is at an angle; starts at 0. (B,) to (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_TIME_FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, angle: torch.Tensor) -> torch.Tensor:
        return self.linear(sinusoidal_features(angle, NUM_TIME_FEATURES, cosine_first=True)).float().squeeze(1)


def student_of(teacher: N) -> N:
    """A trainable copy that embeds its guidance; it predicts what the teacher predicts, at every scale.

    A new guidance embedding has a random first layer and a second one of zeros: were both zero, as in diffusers'
    example, neither would ever get a gradient.
    """
    if embeds_guidance(teacher):
        return copy.deepcopy(teacher).train().requires_grad_(True)
    student = type(teacher).from_config(teacher.config, guidance_embeds=True)
    weights = {name.replace("time_embed.emb.", "time_embed."): value for name, value in teacher.state_dict().items()}
    missing, unexpected = student.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("guidance_embedder" in name for name in missing)
    embedder: ScalarEmbedder = student.time_embed.guidance_embedder
    nn.init.normal_(embedder.linear_1.weight, std=0.02)
    nn.init.zeros_(embedder.linear_1.bias)
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)
    return student.to(next(teacher.parameters()).device).train()


def classifier_free(with_caption: torch.Tensor, without: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Velocities (B, C, h, w) moved on, at scales (B,), along what the caption changes (Ho and Salimans, 2022)."""
    return without + guidance.view(-1, 1, 1, 1) * (with_caption - without)


def guided_velocity(
    teacher: SanaTransformer2DModel,
    latents: torch.Tensor,
    time: torch.Tensor,
    batch: LatentBatch,
    data: LatentSource,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """The flow velocity (B, C, h, w) of a teacher at guidance scales (B,).

    In one pass where the teacher embeds the scale; else by classifier-free guidance against the empty caption with its
    own mask, which is what the teacher has learned without a caption.
    """
    if embeds_guidance(teacher):
        return predict_velocity(teacher, latents, time, batch.caption, batch.mask, guidance)
    with_caption = predict_velocity(teacher, latents, time, batch.caption, batch.mask, None)
    without = predict_velocity(teacher, latents, time, *data.empty_caption(len(latents)), None)
    return classifier_free(with_caption, without, guidance)


class DistillationLosses(Objective[N]):
    """A student, its frozen teacher, and what tells the two apart: a discriminator, or a network for the fakes' score.

    All but the teacher learn in every step. How these networks come to a velocity, and what else takes part in it, is
    the subclass's to say.

    One pass of the student serves both losses: it gives the velocity with its graph, the derivative along the teacher's
    path, and so the clean latents that the discriminator sees. Examples that start from pure noise have no consistency
    loss, whose weight is zero there. The fakes of a step teach the student and the discriminator.
    """

    def __init__(
        self,
        teacher: SanaTransformer2DModel,
        student: N,
        fake_score: N | None,
        data: LatentSource,
        settings: DistillationSettings,
    ) -> None:
        super().__init__()
        assert (fake_score is not None) == bool(settings.matching_weight)
        blocks = settings.head_blocks
        if settings.adversarial_weight and (not blocks or blocks[-1] >= len(teacher.transformer_blocks)):
            raise ValueError(
                f"head_blocks must name some of the teacher's {len(teacher.transformer_blocks)} blocks, got {blocks}"
            )
        self.settings = settings
        self.data = data
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.log_variance = LogVariance() if settings.consistency_weight else None
        self.discriminator = (
            Discriminator(len(blocks), self.teacher.proj_out.in_features) if settings.adversarial_weight else None
        )
        self.fake_score = fake_score
        for network in self.trunks():
            use_training_kernels(network)
        self._features = torch.compile(self._look) if settings.compile else self._look
        self._student_pass = torch.compile(self._differentiate) if settings.compile else self._differentiate
        self._teacher_pass = torch.compile(self._teach) if settings.compile else self._teach
        self._velocity = torch.compile(self._predict) if settings.compile else self._predict

    @abstractmethod
    def velocity(
        self, network: N, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        """Of the student, or of the network for the fakes' score: the flow velocity (B, C, h, w) at guidance scales."""

    @abstractmethod
    def guided(
        self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        """Of the teacher, guided: the flow velocity (B, C, h, w) at guidance scales (B,)."""

    def teacher_residuals(self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch) -> ControlSamples:
        """What is added to the teacher's tokens where the discriminator looks at them."""
        return ()

    def trunks(self) -> list[SanaTrunk]:
        """All networks made of SANA's blocks."""
        return [network for network in self.children() if isinstance(network, SanaTrunk)]

    def groups(self) -> list[ParameterGroup]:
        groups = [self._group("student", self.student, self.settings.student)]
        if self.log_variance is not None:
            settings = replace(self.settings.student, kind="adamw", learning_rate=self.settings.log_variance_rate)
            groups.append(ParameterGroup("log_variance", trainable(self.log_variance), settings))
        if self.fake_score is not None:
            groups.append(self._group("fake_score", self.fake_score, self.settings.fake_score))
        if self.discriminator is not None:
            parameters = trainable(self.discriminator)
            groups.append(ParameterGroup("discriminator", parameters, self.settings.discriminator))
        return groups

    def _group(self, name: str, network: N, settings: OptimiserSettings) -> ParameterGroup:
        matrices = block_matrices(network) if self.settings.use_muon else []
        return ParameterGroup(name, trainable(network), settings, matrices)

    def averaged(self) -> N:
        return self.student

    def own_settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.settings).items() if name not in _NOT_OF_THE_LOSSES}

    @property
    def _no_split_modules(self) -> list[str]:
        # FSDP's hooks on single blocks cannot be differentiated forwards: everything is one unit.
        return []

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        settings = self.settings
        batch = self.data.batch(draws, misaligned=self.discriminator is not None and settings.misaligned_pairs)
        noise = draws.normal(batch.clean.shape[1:])
        guidance = draws.choice(settings.guidance_scales)
        is_pure_noise = draws.uniform() < settings.max_time_share
        drawn = settings.student_angles.draw(draws, settings.sigma_data)
        angle = torch.where(is_pure_noise, math.pi / 2, drawn)
        clean = self._simulated(draws, batch, guidance) if settings.simulated_share else batch.clean
        sample = add_noise(clean, noise, angle)

        losses: dict[str, torch.Tensor] = {}
        if self.log_variance is not None:
            with torch.no_grad():
                teacher_velocity = self._teacher_pass(sample, angle, batch, guidance)
            velocity, derivative = self._student_pass(sample, angle, batch, guidance, teacher_velocity)
            warmup = warmup_share(draws.step, settings.tangent_warmup_steps)
            tangent = consistency_tangent(sample, angle, velocity, teacher_velocity, derivative, warmup)
            each = consistency_loss(velocity, tangent, angle, self.log_variance(angle))
            # By the expected share and not the count, so that parts of a batch add up to the whole.
            losses["consistency"] = torch.where(is_pure_noise, 0.0, each).mean() / (1 - settings.max_time_share)
            losses["derivative_norm"] = derivative.flatten(1).norm(dim=1).mean()
        else:
            velocity = self._velocity(self.student, sample, angle, batch, guidance)
        fake = predict_clean(sample, velocity, angle)
        if self.discriminator is not None:
            losses |= self._adversarial(draws, batch, fake)
        if self.fake_score is not None:
            losses |= self._matching(draws, batch, fake, guidance)
        if settings.reconstruction_weight:
            losses["reconstruction"] = F.mse_loss(fake, batch.clean)
        weights = {
            "consistency": settings.consistency_weight,
            "adversarial": settings.adversarial_weight,
            "discriminator": 1.0,
            "matching": settings.matching_weight,
            "reconstruction": settings.reconstruction_weight,
            "fake_score": 1.0,
        }
        weighted = [weight * losses[name] for name, weight in weights.items() if name in losses]
        return {"loss": torch.stack(weighted).sum(), **losses}

    @torch.no_grad()
    def _simulated(self, draws: Draws, batch: LatentBatch, guidance: torch.Tensor) -> torch.Tensor:
        """Clean latents, some of them the student's own: backward simulation of Yin et al., arXiv 2405.14867.

        One step is simulated, also for where a third and a fourth begin: theirs lie between these and the data's.
        """
        noise = draws.normal(batch.clean.shape[1:])
        angle = torch.full_like(guidance, math.pi / 2)
        own = predict_clean(noise, self._velocity(self.student, noise, angle, batch, guidance), angle)
        is_own = draws.uniform() < self.settings.simulated_share
        return torch.where(is_own.view(-1, 1, 1, 1), own, batch.clean)

    def _adversarial(self, draws: Draws, batch: LatentBatch, fake: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of the student and of the discriminator, which learns from the same fakes, and moves them not."""
        settings, discriminator = self.settings, self.discriminator
        assert discriminator is not None
        features = self._noised_features(draws, fake, batch)
        with frozen(discriminator):
            student_loss = generator_loss(discriminator(features))
        fakes = [discriminator([x.detach() for x in features])]
        with torch.no_grad():
            real_features = self._noised_features(draws, batch.clean, batch)
        if settings.gradient_penalty:
            real_features = [x.requires_grad_() for x in real_features]
        real = discriminator(real_features)
        if batch.wrong_caption is not None and batch.wrong_mask is not None:
            misaligned = replace(batch, caption=batch.wrong_caption, mask=batch.wrong_mask)
            with torch.no_grad():
                wrong_features = self._noised_features(draws, batch.clean, misaligned)
            fakes.append(discriminator(wrong_features))
        loss = discriminator_loss(real, torch.cat(fakes))
        if settings.gradient_penalty:
            loss = loss + settings.gradient_penalty * gradient_penalty(real, real_features)
        return {"adversarial": student_loss, "discriminator": loss}

    def _matching(
        self, draws: Draws, batch: LatentBatch, fake: torch.Tensor, guidance: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of the student and of the network for the fakes' score, from one pass of that."""
        settings, fake_score, times = self.settings, self.fake_score, self.settings.matching_noisings
        assert fake_score is not None
        angle = torch.cat([settings.matching_angles.draw(draws, settings.sigma_data) for _ in range(times)])
        noise = torch.cat([draws.normal(fake.shape[1:]) for _ in range(times)])
        batch, fake, guidance = batch.repeated(times), torch.cat([fake] * times), torch.cat([guidance] * times)
        clean = fake.detach()
        noisy = add_noise(clean, noise, angle)
        velocity = self._velocity(fake_score, noisy, angle, batch, guidance)
        with torch.no_grad():
            by_teacher = predict_clean(noisy, self._teacher_pass(noisy, angle, batch, guidance), angle)
            by_fake = predict_clean(noisy, velocity, angle)
        return {
            "matching": matching_loss(fake, by_teacher, by_fake),
            "fake_score": F.mse_loss(velocity, velocity_target(clean, noise, angle)),
        }

    def _noised_features(self, draws: Draws, clean: torch.Tensor, batch: LatentBatch) -> list[torch.Tensor]:
        """The teacher's features of clean latents, noised to an angle and by a noise of their own."""
        angle = self.settings.discriminator_angles.draw(draws, self.settings.sigma_data)
        noisy = add_noise(clean, draws.normal(clean.shape[1:]), angle)
        c, s = cosine_and_sine(angle, noisy)
        return self._features(noisy / (c + s), flow_time(angle), batch)

    def _look(self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch) -> list[torch.Tensor]:
        teacher = self.teacher
        guidance = torch.full_like(time, teacher.config.guidance_embeds_scale) if embeds_guidance(teacher) else None
        residuals = self.teacher_residuals(latents, time, batch)
        return block_features(
            teacher, self.settings.head_blocks, latents, time, batch.caption, batch.mask, guidance, residuals
        )

    def _predict(
        self,
        network: N,
        sample: torch.Tensor,
        angle: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        def flow(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.velocity(network, latents, time, batch, guidance)

        return trigflow_velocity(flow, sample, angle, sigma_data=1.0)

    def _differentiate(
        self,
        sample: torch.Tensor,
        angle: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
        teacher_velocity: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def student(sample: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
            return self._predict(self.student, sample, angle, batch, guidance)

        in_one_pass = not self.student.gradient_checkpointing
        return velocity_and_derivative(student, sample, angle, teacher_velocity, in_one_pass)

    def _teach(
        self, sample: torch.Tensor, angle: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        def flow(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.guided(latents, time, batch, guidance)

        return trigflow_velocity(flow, sample, angle, sigma_data=1.0)


class Distillation(DistillationLosses[SanaTransformer2DModel]):
    """A transformer is the student.

    It and the network for the fakes' score, where matching needs one, start from those that are given, or from the
    teacher.
    """

    def __init__(
        self,
        teacher: SanaTransformer2DModel,
        data: LatentSource,
        settings: DistillationSettings,
        student: SanaTransformer2DModel | None = None,
        fake_score: SanaTransformer2DModel | None = None,
    ) -> None:
        student = student_of(teacher if student is None else student)
        fake_score = student_of(teacher if fake_score is None else fake_score) if settings.matching_weight else None
        super().__init__(teacher, student, fake_score, data, settings)

    def velocity(
        self,
        network: SanaTransformer2DModel,
        latents: torch.Tensor,
        time: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        return predict_velocity(network, latents, time, batch.caption, batch.mask, guidance)

    def guided(
        self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        return guided_velocity(self.teacher, latents, time, batch, self.data, guidance)
