"""What ControlNets give to what a transformer adds to the output of each of its blocks.

B batch, N = H*W tokens, D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

# Where a ControlNet's residual number k goes: to the output of block k + 1 (diffusers), or of block k, which is to say
# before block k + 1 (NVlabs).
Placement = Literal["after", "before"]


@dataclass(frozen=True)
class EarlyResiduals:
    """Residuals (B, N, D) that go before a block: number k is added to the output of block k, the first to block 0's.

    Not a sequence, for in diffusers' sequences number k belongs to block k + 1, and nothing belongs to block 0.
    """

    samples: tuple[torch.Tensor, ...]

    def to(self, *args: Any, **kwargs: Any) -> "EarlyResiduals":
        """The same on another device, or in another dtype; accelerate's hooks call it too."""
        return EarlyResiduals(tuple(sample.to(*args, **kwargs) for sample in self.samples))


ControlSamples = Sequence[torch.Tensor] | EarlyResiduals


def residuals_by_block(samples: ControlSamples) -> dict[int, torch.Tensor]:
    """The residuals by the number of the block to whose output they are added."""
    if isinstance(samples, EarlyResiduals):
        return dict(enumerate(samples.samples))
    return dict(enumerate(samples, start=1))


def scale_residuals(samples: ControlSamples, scale: float | torch.Tensor) -> ControlSamples:
    """Residuals times a factor, or factors (B, 1, 1).

    The result is always new memory. Pipelines do this outside of a ControlNet, which may be compiled: residuals leave
    the memory that CUDA graphs write again so, and another factor compiles nothing anew.
    """
    if isinstance(samples, EarlyResiduals):
        return EarlyResiduals(tuple(sample * scale for sample in samples.samples))
    return tuple(sample * scale for sample in samples)


def sum_residuals(controls: Iterable[ControlSamples]) -> ControlSamples:
    """Residuals of several ControlNets to those of all together; depths and placements may differ."""
    total: dict[int, torch.Tensor] = {}
    for samples in controls:
        for block, residual in residuals_by_block(samples).items():
            total[block] = total[block] + residual if block in total else residual
    in_order = tuple(total[block] for block in sorted(total))
    return EarlyResiduals(in_order) if 0 in total else in_order
