"""How a stage is trained, whatever it trains: length, batch, precision, and what is written when."""

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["bf16", "fp32"]

_AT_LEAST_ONE = ("steps", "batch_size", "accumulation", "checkpoint_every", "keep", "log_every", "validate_every")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long to train, on how much at once, and what is written when.

    Raises:
        ValueError: for an unknown precision, a number below 1 where something is counted, or a batch that cannot be cut
            into the micro-steps asked for.
    """

    steps: int  # updates
    batch_size: int  # of a step, over all processes and micro-steps
    accumulation: int = 1  # micro-steps a step is cut into, to need less memory
    precision: Precision = "bf16"  # of the products, by autocast; weights are kept as they are
    ema_decay: float = 0.999
    # Early steps weigh less than the decay says, and what training began with is forgotten; without it, that is part of
    # the average.
    ema_warmup: bool = True
    seed: int = 0
    checkpoint_every: int = 200  # steps
    keep: int = 2  # how many of the newest checkpoints
    log_every: int = 20  # steps
    validate_every: int = 1000  # steps; and after the last
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        self.part_size(num_processes=1)

    def average_decay(self, step: int) -> float:
        """Of the moving average, at a step counted from 0; with warm-up it reaches back a ninth of the run at most."""
        return min(self.ema_decay, (step + 1) / (step + 10)) if self.ema_warmup else self.ema_decay

    def part_size(self, num_processes: int) -> int:
        """Examples of one process in one micro-step."""
        parts = self.accumulation * num_processes
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes × micro-steps, {num_processes} × {self.accumulation}, got"
                f" {self.batch_size}"
            )
        return self.batch_size // parts
