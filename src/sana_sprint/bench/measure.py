"""Two runs of one case to their times, taken in turn, their memory and operations, and how far they agree."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sana_sprint.bench.agreement import Agreement, compare, worst
from sana_sprint.bench.cases import Run, Runs
from sana_sprint.memory.tracker import PeakBytes

# Numbers of rounds: what is asked for while counting and timing has not been asked for while warming up.
_WARM_UP, _COUNTING, _PEAK, _FIRST_TIMED = range(4)


class Counts(NamedTuple):
    """What one run takes.

    Attributes:
        operations: multiplications and additions of matrix products, convolutions and attention.
        peak_bytes: of tensors at once, weights apart; None where it cannot be seen.
    """

    operations: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one library did: the seconds of every round, in order, and what a round takes."""

    seconds: list[float]
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A case on both sides.

    Attributes:
        ours, theirs: theirs is None where diffusers was not asked, or could not do it.
        agreement: the worst of all rounds; None without theirs.
        failure: what kept diffusers from it, if anything did.
    """

    ours: Side
    theirs: Side | None = None
    agreement: Agreement | None = None
    failure: str | None = None


def _attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call takes until its result is there, and the result."""
    synchronise(device)
    started = time.perf_counter()
    result = run()
    synchronise(device)
    return time.perf_counter() - started, result


def count(run: Run, device: torch.device, is_compiled: bool) -> Counts:
    """What a run takes, once it has been warmed up. Operations are counted without compilation.

    On CUDA the allocator has seen the peak. On a CPU every tensor is counted while it lives: an allocator there gives
    back to the system what it likes when it likes, so the resident memory of a process that did the other side's work
    a moment ago tells little. What compiled code holds is not seen by that.
    """
    on_cuda, counts_tensors = device.type == "cuda", device.type == "cpu" and not is_compiled
    # The one kernel of a CPU that torch has no formula for.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations}
    tensors = PeakBytes()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        operations = stack.enter_context(FlopCounterMode(display=False, custom_mapping=formulas))
        if counts_tensors:
            stack.enter_context(tensors)
        run(_COUNTING)
    peak = tensors.peak if counts_tensors else None
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(_PEAK)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return Counts(operations.get_total_flops(), peak)


def _failure_of(run: Run) -> str | None:
    """What keeps diffusers from a case, if anything does: whatever it is, it is a finding and no error of ours."""
    try:
        run(_WARM_UP)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


@torch.no_grad()
def measure(runs: Runs, rounds: int, device: torch.device, is_compiled: bool = False) -> Measured:
    """Warm up, count, then time both in turn: ours, theirs, ours, theirs, ...

    Args:
        runs: of the case.
        rounds: how often each is timed.
        device: where they compute.
        is_compiled: whether they run compiled code.
    """
    runs.ours(_WARM_UP)
    failure = None if runs.theirs is None else _failure_of(runs.theirs)
    running = [runs.ours] if runs.theirs is None or failure else [runs.ours, runs.theirs]
    counts = [count(run, device, is_compiled) for run in running]
    seconds: list[list[float]] = [[] for _ in running]
    agreements = []
    for number in range(_FIRST_TIMED, _FIRST_TIMED + rounds):
        results = []
        for run, times in zip(running, seconds):
            taken, result = timed(partial(run, number), device)
            times.append(taken)
            results.append(runs.numbers(result))
        if len(results) == 2:
            agreements.append(compare(*results))
    ours, *theirs = (Side(seconds=times, counts=taken) for times, taken in zip(seconds, counts))
    return Measured(
        ours=ours,
        theirs=theirs[0] if theirs else None,
        agreement=worst(agreements) if agreements else None,
        failure=failure,
    )
