"""Groups of parameters, each with its own settings, to their updates: AdamW, AdamW in 8 bits, Muon."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from sana_sprint.training.sharding import part_like, whole

Schedule = Literal["cosine", "constant"]
Kind = Literal["adamw", "adamw_8bit"]

# bitsandbytes keeps the moments of smaller parameters in float32.
LEAST_8BIT_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """How fast a group of parameters is trained; rates rise linearly to their peak, then follow the schedule.

    Raises:
        ValueError: for an unknown schedule or kind.
    """

    learning_rate: float  # of AdamW
    matrix_learning_rate: float = 2e-3  # of Muon, for the parameters that are handed over as matrices
    warmup_steps: int = 200
    schedule: Schedule = "cosine"  # falls to a tenth of a percent of the peak at the last step; "constant" stays
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    kind: Kind = "adamw"  # "adamw_8bit" keeps its moments in a quarter of the memory

    def __post_init__(self) -> None:
        for name, allowed in (("schedule", get_args(Schedule)), ("kind", get_args(Kind))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained under one name with one group of settings, and clipped together."""

    name: str
    parameters: Sequence[nn.Parameter]
    settings: OptimiserSettings
    matrices: Sequence[nn.Parameter] = ()  # those of the parameters that Muon trains; AdamW trains the others


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def rate_share(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Share of the peak rates at a step counted from 0, of `steps`: linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


class Optimiser:
    """The updates of one group: AdamW, and Muon for matrices, whose updates it makes orthogonal.

    A matrix may be a 1x1 convolution's weight. (Jordan et al., "Muon", 2024; its rate is scaled to AdamW's, as in Liu
    et al., "Muon is Scalable", 2025.)

    Raises:
        RuntimeError: if AdamW in 8 bits is asked for where bitsandbytes cannot run it.
    """

    def __init__(self, group: ParameterGroup) -> None:
        self.name, self.settings, self.matrices = group.name, group.settings, group.matrices
        taken = {id(matrix) for matrix in group.matrices}
        self.adamw = _adamw([parameter for parameter in group.parameters if id(parameter) not in taken], self.settings)
        # Views, because torch's Muon takes nothing but two dimensions; they share the parameters' memory.
        self.views = [nn.Parameter(matrix.detach().flatten(1)) for matrix in group.matrices]
        self.muon = (
            torch.optim.Muon(
                self.views,
                lr=self.settings.matrix_learning_rate,
                weight_decay=self.settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            if self.matrices
            else None
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the group; read from AdamW, for accelerate puts shards into the place of what was there."""
        return [*(parameter for group in self.adamw.param_groups for parameter in group["params"]), *self.matrices]

    def rates(self, step: int, steps: int) -> dict[str, float]:
        """The learning rates at a step counted from 0, of `steps`, by name."""
        share = rate_share(self.settings, step, steps)
        rates = {"learning_rate": self.settings.learning_rate * share}
        if self.muon is not None:
            rates["matrix_learning_rate"] = self.settings.matrix_learning_rate * share
        return rates

    def clip(self) -> torch.Tensor:
        """Shorten the gradients to the settings' norm, all by one factor; returns their norm before."""
        return whole(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))

    def update(self, step: int, steps: int) -> None:
        """Update all parameters by their gradients, at the rates of a step counted from 0, of `steps`."""
        rates = self.rates(step, steps)
        _set_rate(self.adamw, rates["learning_rate"])
        self.adamw.step()
        if self.muon is not None:
            _set_rate(self.muon, rates["matrix_learning_rate"])
            for view, matrix in zip(self.views, self.matrices, strict=True):
                view.grad = None if matrix.grad is None else matrix.grad.flatten(1)
            self.muon.step()
            self.muon.zero_grad()

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The moments, whole; every process must call this, for each may hold a part of them."""
        return {
            "adamw": whole(self.adamw.state_dict()),
            "muon": self.muon.state_dict() if self.muon is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for parameter, moments in self.adamw.state.items():
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    moments[name] = part_like(value, parameter)
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])


def _adamw(parameters: list[nn.Parameter], settings: OptimiserSettings) -> torch.optim.Optimizer:
    if settings.kind == "adamw_8bit":
        return _adamw_8bit(parameters, settings)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _adamw_8bit(parameters: list[nn.Parameter], settings: OptimiserSettings) -> torch.optim.Optimizer:
    device = parameters[0].device
    trial = nn.Parameter(torch.zeros(LEAST_8BIT_SIZE, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        # Late, for it takes seconds to import.
        from bitsandbytes.optim import AdamW8bit

        AdamW8bit([trial]).step()
    except Exception as error:
        raise RuntimeError(
            f"bitsandbytes cannot run AdamW in 8 bits on {device}: choose kind='adamw' ({error})"
        ) from error
    return AdamW8bit(parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
