"""An objective to trained weights: the loop that every stage runs, on one process or many, resumable to the bit.

A step draws all its random numbers from generators seeded with (seed, step), so a run that stopped and went on makes
the same steps as one that did not.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from sana_sprint.training.average import MovingAverage
from sana_sprint.training.draws import Draws
from sana_sprint.training.journal import Journal
from sana_sprint.training.optimiser import Optimiser, ParameterGroup, trainable
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.sharding import part_like, whole
from sana_sprint.training.states import StateFolder

M = TypeVar("M", bound=nn.Module)

# So many steps without a finite gradient, one after the other, are no accident any more.
_MOST_SKIPPED = 20

# A run may go on with other values of these: its steps stay the same, up to the order of sums.
_FREE_SETTINGS = ("accumulation", "checkpoint_every", "keep", "log_every", "validate_every", "tensorboard")


class Objective(nn.Module, Generic[M]):
    """What a stage trains: its networks, as submodules, and the losses of one step.

    Networks without a single parameter that requires gradients stay in evaluation mode.
    """

    @abstractmethod
    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        """Losses by name, as means over `draws.size` examples; "loss" is minimised, the others are logged."""

    @abstractmethod
    def groups(self) -> list[ParameterGroup]:
        """Who is trained, and how; every parameter that requires gradients is in one group."""

    @abstractmethod
    def averaged(self) -> M:
        """The submodule whose moving average is the result."""

    def own_settings(self) -> dict[str, Any]:
        """What the losses of a step depend on, by name, beside the loop's and the groups' settings.

        A run is gone on with the same only. Values are numbers, strings, and tuples and dictionaries of these.
        """
        return {}

    def train(self, mode: bool = True) -> "Objective[M]":
        super().train(mode)
        for network in self.children():
            network.train(mode and any(parameter.requires_grad for parameter in network.parameters()))
        return self

    @property
    def _no_split_modules(self) -> list[str]:
        # What accelerate shards in one piece, unless told otherwise: the blocks that the networks are made of.
        return sorted(
            {name for network in self.children() for name in getattr(network, "_repeated_blocks", None) or ()}
        )


# Its score after a number of steps, the higher the better, if it has one.
Validation = Callable[[nn.Module, int], float | None]


def _device(accelerator: Accelerator, wanted: torch.device) -> torch.device:
    """The device asked for, or this process's own of that kind if there are several processes.

    Raises:
        ValueError: if the processes were launched on another kind of device.
    """
    if not accelerator.use_distributed:
        return wanted
    own = accelerator.device
    if own.type != wanted.type:
        raise ValueError(f"the processes were launched on {own.type}, and the device asked for is {wanted.type}")
    return own


def check_accelerator(accelerator: Accelerator, groups: list[ParameterGroup]) -> None:
    """Refuse what cannot work before any work is done."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed clips and updates by itself, all parameters alike, and cannot train groups of parameters with"
            " settings of their own: launch with DDP or FSDP 2"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported: launch with fsdp_version 2")
    for group in groups:
        if accelerator.is_fsdp2 and group.matrices:
            raise ValueError(
                f"Muon needs whole matrices, and FSDP shards those of group {group.name!r}: launch with DDP"
            )
        if accelerator.is_fsdp2 and group.settings.kind == "adamw_8bit":
            raise ValueError(f"AdamW in 8 bits cannot be sharded: choose kind='adamw' for group {group.name!r}")


def _check_groups(objective: nn.Module, groups: list[ParameterGroup]) -> None:
    """Hold the objective to its word: what requires a gradient is in one group, and nothing else is in any."""
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    assert sorted(grouped) == sorted(map(id, trainable(objective))), "groups and trained parameters differ"


def _compared(settings: LoopSettings, groups: list[ParameterGroup], own: dict[str, Any]) -> dict[str, Any]:
    """What a run must be gone on with, by name; `own` are the objective's settings, and what it learns from."""
    loop = {name: value for name, value in asdict(settings).items() if name not in _FREE_SETTINGS}
    grouped = {f"{group.name}.{name}": value for group in groups for name, value in asdict(group.settings).items()}
    return {**loop, **grouped, **own}


class _Run(Generic[M]):
    """An objective with all that changes from step to step."""

    def __init__(
        self,
        objective: Objective[M],
        settings: LoopSettings,
        folder: Path,
        device: torch.device,
        sources: Mapping[str, str],
    ) -> None:
        self.settings = settings
        self.states = StateFolder(folder)
        # Precision is ours: accelerate can hold but one for the whole process, and a recipe's stages may differ.
        self.accelerator = Accelerator(mixed_precision="no", device_placement=False)
        self.device = _device(self.accelerator, device)
        self.part_size = settings.part_size(self.accelerator.num_processes)
        groups = objective.groups()
        _check_groups(objective, groups)
        check_accelerator(self.accelerator, groups)
        if not self.accelerator.is_fsdp2:
            objective.to(self.device)
        self.objective = objective
        self.average = MovingAverage(objective.averaged())
        self.optimisers = [Optimiser(group) for group in groups]
        self.network = self.accelerator.prepare(objective, *(each.adamw for each in self.optimisers))[0]
        self.average.follow()
        self.compared = _compared(settings, groups, {**objective.own_settings(), **sources})
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self.best_score = float("-inf")

    @property
    def is_done(self) -> bool:
        return self.step == self.settings.steps

    def is_due(self, every: int) -> bool:
        """Whether it is time for what happens every so many steps and after the last."""
        return self.step % every == 0 or self.is_done

    def make_step(self) -> dict[str, float]:
        """Update all groups, or none of them if the loss or a gradient is not finite; returns what to report."""
        losses = self._accumulate_gradients()
        norms = {f"{each.name}_gradient_norm": each.clip().to(self.device) for each in self.optimisers}
        values = dict(zip([*losses, *norms], torch.stack([*losses.values(), *norms.values()]).tolist()))
        if all(math.isfinite(values[name]) for name in ("loss", *norms)):
            for each in self.optimisers:
                each.update(self.step, self.settings.steps)
            self.average.update(self.settings.average_decay(self.step))
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        rates = {
            f"{each.name}_{name}": rate
            for each in self.optimisers
            for name, rate in each.rates(self.step, self.settings.steps).items()
        }
        for each in self.optimisers:
            each.drop_gradients()
        self.step += 1
        return {**values, **rates, "skipped": self.skipped}

    def _accumulate_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the step's mean loss, from all processes and micro-steps; returns the mean losses."""
        accumulation = self.settings.accumulation
        parts = accumulation * self.accelerator.num_processes
        first = accumulation * self.accelerator.process_index
        total: dict[str, torch.Tensor] = {}
        for part in range(first, first + accumulation):
            draws = Draws.of_step(self.settings.seed, self.step, self.part_size, part, parts, self.device)
            is_last = part == first + accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.network):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                    losses = self.network(draws)
                (losses["loss"] / accumulation).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0.0) + loss.detach().float() / accumulation
        means = self.accelerator.reduce(torch.stack(list(total.values())), "mean")
        return dict(zip(total, means))

    def validate(self, validate: Validation) -> float | None:
        """The average's score, on the main process; the best average so far is kept in a file."""
        average = self.average.gather()
        if not self.accelerator.is_main_process:
            return None
        score = validate(average, self.step)
        if score is not None and score > self.best_score:
            self.best_score = score
            self.states.save_best(self.step, score, average.state_dict())
        return score

    def save(self) -> None:
        state = {
            "settings": self.compared,
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best_score": self.best_score,
            "network": whole(self._trained_state()),
            "average": self.average.gather().state_dict(),
            "optimisers": {each.name: each.state_dict() for each in self.optimisers},
        }
        if self.accelerator.is_main_process:
            self.states.save(self.step, state, self.settings.keep)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the newest state in the folder, if there is one."""
        state = self.states.newest(self.compared)
        if state is None:
            return
        for name, value in self._trained_state().items():
            value.copy_(part_like(state["network"][name], value))
        self.average.load_state_dict(state["average"])
        for each in self.optimisers:
            each.load_state_dict(state["optimisers"][each.name])
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_a_row, self.best_score = state["skipped_in_a_row"], state["best_score"]

    def _trained_state(self) -> dict[str, torch.Tensor]:
        """Trained parameters and all buffers, by name; a frozen network comes from where it came from before."""
        frozen = {id(parameter) for parameter in self.objective.parameters() if not parameter.requires_grad}
        state = self.objective.state_dict(keep_vars=True)
        return {name: value.detach() for name, value in state.items() if id(value) not in frozen}


def train(
    objective: Objective[M],
    settings: LoopSettings,
    folder: Path,
    title: str,
    device: torch.device,
    validate: Validation | None = None,
    sources: Mapping[str, str] | None = None,
) -> M:
    """Train an objective's groups; return the moving average of its averaged part.

    Launched with `accelerate launch`, all processes train together, with DDP or FSDP 2, whatever precision accelerate
    is configured for.

    Args:
        objective: trained in place, in its own dtype (float32 for master weights).
        settings: length, batch, seed, and what is written when.
        folder: where states, `best.pt` and `log.jsonl` are kept (see `StateFolder` and `Journal`); a run goes on from
            the newest state there. Processes on several machines must share it.
        title: shown before the progress bar.
        device: where to train.
        validate: called every `validate_every` steps, and after the last, with the average and the number of steps,
            on the main process. The average with the highest score is kept in `best.pt`.
        sources: what tells the data and networks that are learned from from others, by name (`identity.sources`).

    Raises:
        ValueError: if `folder` holds the state of a run with other settings or sources; for a batch that the processes
            cannot share, and for what accelerate is configured for and cannot work.
        FloatingPointError: if the loss or the gradients are infinite or undefined in 20 steps in a row; a single such
            step is skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(objective, settings, folder, device, sources or {})
    run.resume()
    run.network.train()
    with (
        Journal(folder if run.accelerator.is_main_process else None, title, run.step, settings) as journal,
        warnings.catch_warnings(),
    ):
        # Of DDP, for weights of one input channel, whose strides may differ and mean the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        while not run.is_done:
            values = run.make_step()
            journal.advance()
            if run.skipped_in_a_row == _MOST_SKIPPED:
                found = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
                raise FloatingPointError(
                    f"{title}: {_MOST_SKIPPED} steps in a row were not finite, up to step {run.step}: {found}"
                )
            score = run.validate(validate) if validate is not None and run.is_due(settings.validate_every) else None
            if score is not None or run.is_due(settings.log_every):
                journal.report(run.step, values if score is None else {**values, "score": score})
            if run.is_due(settings.checkpoint_every):
                run.save()
    run.accelerator.wait_for_everyone()
    return run.average.gather()
