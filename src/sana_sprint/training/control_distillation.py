"""A ControlNet of a flow teacher to one for the student that was distilled from it: one to four steps, by a drawing.

SANA-Sprint's second stage of ControlNet training (arXiv 2503.09641, section 3.4): the losses are the distillation's.

B batch, C channels, h w latent grid.
"""

import torch

from sana_sprint.training.control import control_residuals, controlled_velocity
from sana_sprint.training.datasets.source import LatentBatch, LatentSource
from sana_sprint.training.distillation import DistillationLosses, DistillationSettings, classifier_free, student_of
from sana_sprint.training.flow import use_training_kernels
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import ControlSamples


class ControlDistillation(DistillationLosses[SanaControlNetModel]):
    """A ControlNet on a transformer that was distilled before, and stays as it is, is the student.

    The teacher is a flow transformer with a ControlNet of its own, from which the student's starts. Both are guided
    against the empty caption with the same drawing, at a scale of 1 where they embed one: with a ControlNet they have
    learned no other. The network for the fakes' score is a ControlNet on the teacher.

    Args:
        teacher: the flow transformer.
        teacher_control: its ControlNet.
        transformer: the distilled one.
        data: with drawings.
        settings: as for any distillation.
    """

    def __init__(
        self,
        teacher: SanaTransformer2DModel,
        teacher_control: SanaControlNetModel,
        transformer: SanaTransformer2DModel,
        data: LatentSource,
        settings: DistillationSettings,
    ) -> None:
        fake_score = student_of(teacher_control) if settings.matching_weight else None
        super().__init__(teacher, student_of(teacher_control), fake_score, data, settings)
        self.teacher_control = teacher_control.eval().requires_grad_(False)
        self.transformer = transformer.eval().requires_grad_(False)
        for network in (self.teacher_control, self.transformer):
            use_training_kernels(network)

    def velocity(
        self,
        network: SanaControlNetModel,
        latents: torch.Tensor,
        time: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        transformer = self.transformer if network is self.student else self.teacher
        return controlled_velocity(transformer, network, latents, time, batch, guidance)

    def guided(
        self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch, guidance: torch.Tensor
    ) -> torch.Tensor:
        ones = torch.ones_like(guidance)
        empty = LatentBatch(batch.clean, *self.data.empty_caption(len(latents)), control=batch.control)
        with_caption, without = (
            controlled_velocity(self.teacher, self.teacher_control, latents, time, text, ones)
            for text in (batch, empty)
        )
        return classifier_free(with_caption, without, guidance)

    def teacher_residuals(self, latents: torch.Tensor, time: torch.Tensor, batch: LatentBatch) -> ControlSamples:
        return control_residuals(self.teacher_control, latents, time, batch, torch.ones_like(time))
