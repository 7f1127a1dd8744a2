"""A model and a loss to trained weights: the optimiser loop that every stage runs, resumable to the bit.

A step draws all its random numbers from generators seeded with (seed, step), so a run that stopped and went on makes
the same steps as one that did not.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from sana_sprint.files import write_whole


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """How long and how fast to train; rates rise linearly, then fall along a cosine to a tenth of a percent."""

    steps: int
    batch_size: int
    learning_rate: float  # of AdamW
    matrix_learning_rate: float = 2e-3  # of Muon, for the parameters that are handed over as matrices
    warmup_steps: int = 200
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 200  # steps
    log_every: int = 20  # steps


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step."""

    rng: np.random.Generator
    generator: torch.Generator  # of the CPU, so that a seed means the same numbers on every device

    def normal(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(tuple(shape), generator=self.generator).to(device)

    def uniform(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(tuple(shape), generator=self.generator).to(device)

    @classmethod
    def of_step(cls, seed: int, step: int) -> "Draws":
        rng = np.random.default_rng((seed, step))
        return cls(rng, torch.Generator().manual_seed(int(rng.integers(2**62))))


M = TypeVar("M", bound=nn.Module)

# Losses by name, from the random numbers of a step; the one named "loss" is minimised, the others are logged.
LossFunction = Callable[[Draws], dict[str, torch.Tensor]]


def rate_share(settings: OptimiserSettings, step: int) -> float:
    """Share of the peak rates at a step counted from 0: linear warm-up, then a cosine down to 0.001."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


class Optimiser:
    """AdamW, and Muon for matrices, whose updates it makes orthogonal; a matrix may be a 1x1 convolution's weight.

    (Jordan et al., "Muon", 2024; its rate is scaled to AdamW's, as in Liu et al., "Muon is Scalable", 2025.)
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], settings: OptimiserSettings
    ) -> None:
        self.settings = settings
        self.parameters = parameters
        self.matrices = matrices
        taken = {id(matrix) for matrix in matrices}
        self.adamw = torch.optim.AdamW(
            [parameter for parameter in parameters if id(parameter) not in taken],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # Views, because torch's Muon takes nothing but two dimensions; they share the parameters' memory.
        self.views = [nn.Parameter(matrix.detach().flatten(1)) for matrix in matrices]
        self.muon = (
            torch.optim.Muon(
                self.views,
                lr=settings.matrix_learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            if matrices
            else None
        )

    def step(self, step: int) -> torch.Tensor:
        """Clip the gradients, update all parameters, drop the gradients; returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        share = rate_share(self.settings, step)
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.learning_rate * share
        self.adamw.step()
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = self.settings.matrix_learning_rate * share
            for view, matrix in zip(self.views, self.matrices, strict=True):
                view.grad = None if matrix.grad is None else matrix.grad.flatten(1)
            self.muon.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict() if self.muon is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the exponential moving average of all parameters towards the model's; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def train(
    model: M,
    loss_function: LossFunction,
    settings: OptimiserSettings,
    folder: Path,
    title: str,
    use_bfloat16: bool = True,
    matrices: Sequence[nn.Parameter] = (),
) -> M:
    """Train the parameters of `model` that require gradients; return their moving average.

    Args:
        model: trained in place, in its own dtype (float32 for master weights).
        loss_function: losses of one step; it runs under bfloat16 autocast if `use_bfloat16`.
        settings: length, rates and seed.
        folder: where `state.pt` (written every `checkpoint_every` steps, gone on from if it is there) and `log.jsonl`
            (one line of losses every `log_every` steps) are kept.
        title: shown before the progress bar.
        matrices: those of the parameters that Muon trains; AdamW trains the others.

    Raises:
        ValueError: if `folder` holds the state of a run with other settings.
        FloatingPointError: if the loss becomes infinite or NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = Optimiser(parameters, matrices, settings)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    state_path = folder / "state.pt"
    step = _resume(state_path, settings, model, average, optimiser)
    device = next(model.parameters()).device
    started, first_step, losses = time.monotonic(), step, {}
    with (
        tqdm(total=settings.steps, initial=step, desc=title, unit="step", dynamic_ncols=True, disable=None) as bar,
        open(folder / "log.jsonl", "a", encoding="utf-8") as log,
    ):
        model.train()
        while step < settings.steps:
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                losses = loss_function(Draws.of_step(settings.seed, step))
            if not torch.isfinite(losses["loss"]):
                raise FloatingPointError(f"{title}: the loss is {losses['loss'].item()} at step {step}")
            losses["loss"].backward()
            norm = optimiser.step(step)
            # Early steps weigh less than the decay says, or the average would remember the initialisation.
            update_average(average, model, min(settings.ema_decay, (step + 1) / (step + 10)))
            step += 1
            bar.update()
            if step % settings.log_every == 0 or step == settings.steps:
                values = {name: round(value.item(), 6) for name, value in losses.items()}
                rate = (step - first_step) / (time.monotonic() - started)
                entry = {"step": step, **values, "gradient_norm": round(norm.item(), 4), "steps_per_second": rate}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                _save_state(state_path, settings, model, average, optimiser, step)
    return average


def _save_state(
    path: Path,
    settings: OptimiserSettings,
    model: nn.Module,
    average: nn.Module,
    optimiser: Optimiser,
    step: int,
) -> None:
    state = {
        "settings": asdict(settings),
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    write_whole(path, lambda partial: torch.save(state, partial))


def _resume(path: Path, settings: OptimiserSettings, model: nn.Module, average: nn.Module, optimiser: Optimiser) -> int:
    """Load the state in `path`, if there is one; return the number of steps done."""
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    present = asdict(settings)
    changed = {name for name in present if state["settings"].get(name) != present[name]}
    if changed:
        raise ValueError(
            f"{path} belongs to a run with other settings ({', '.join(sorted(changed))}); choose another output folder"
            " or remove it"
        )
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
