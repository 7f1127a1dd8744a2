"""Models, cases, sizes and batches to a row of results each, with what does not fit refused before it starts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sana_sprint.bench.agreement import FLOAT8_BOUND, bound_for
from sana_sprint.bench.cases import Case
from sana_sprint.bench.measure import measure
from sana_sprint.bench.needs import Needs
from sana_sprint.bench.rows import Row
from sana_sprint.bench.twins import Pair, Twins
from sana_sprint.memory.configs import PipelineConfigs
from sana_sprint.memory.loading import budget_of
from sana_sprint.memory.stages import Workload
from sana_sprint.quantisation.float8 import check_float8
from sana_sprint.sizes import readable_bytes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how.

    Attributes:
        models: configs by the name that reports show.
        cases: each is measured at every model, size and batch that makes a difference to it.
        sizes: width and height of pictures, in pixels.
        batches: pictures at once.
        dtype, device: of all networks.
        rounds: how often each side is timed.
        compiles: whether transformers and decoders are compiled, on both sides.
        float8: whether the products of our transformer are in float8.
        seed: of weights and noise.
        memory: bytes of the device; None is what is free.

    Raises:
        ValueError: for a size that the networks have no cells for.
        ImportError: for float8 without torchao.
    """

    models: dict[str, PipelineConfigs]
    cases: tuple[Case, ...]
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rounds: int
    compiles: bool = False
    float8: bool = False
    seed: int = 0
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.float8:
            check_float8()
        for width, height in self.sizes:
            if width % 32 or height % 32:
                raise ValueError(f"width and height must be multiples of 32 pixels, got {width}x{height}")


class Job(NamedTuple):
    """A case, and where it is measured."""

    case: Case
    model: str
    workload: Workload

    @property
    def row(self) -> Row:
        """Without a result yet."""
        size = (self.workload.width, self.workload.height)
        return Row(
            case=self.case.name,
            model=self.model if self.case.has_model else None,
            size=size if self.case.has_size else None,
            batch=self.workload.batch_size,
        )


def jobs_of(settings: Settings) -> list[Job]:
    """Every combination that makes a difference, those of one case together: they share their weights."""
    return [
        Job(case, model, Workload(height=height, width=width, batch_size=batch, dtype=settings.dtype))
        for index, model in enumerate(settings.models)
        for case in settings.cases
        if case.has_model or index == 0
        for width, height in (settings.sizes if case.has_size else settings.sizes[:1])
        for batch in settings.batches
    ]


class Session:
    """Measures one case after the other.

    Args:
        settings: what is measured.
        say: told in a line what is being done, and what came of it.
    """

    def __init__(self, settings: Settings, say: Callable[[str], object]) -> None:
        self.settings = settings
        self.say = say
        budget = budget_of(settings.device, settings.memory)
        free = budget.host if budget.device is None else budget.device
        assert free is not None  # of the device that computes it is always known
        self._free = free
        self._twins: tuple[str, Twins] | None = None
        self._needs: dict[tuple[str, Workload], Needs] = {}

    def rows(self) -> Iterator[Row]:
        """The results, in order, each when it is there."""
        jobs = jobs_of(self.settings)
        for number, job in enumerate(jobs, start=1):
            self.say(f"[{number}/{len(jobs)}] {job.row.title}")
            row = self._measured(job)
            self.say(f"[{number}/{len(jobs)}] {row.summary}")
            yield row

    def _measured(self, job: Job) -> Row:
        settings, networks = self.settings, job.case.networks
        new = Needs(settings.models[job.model], job.workload, settings.float8)
        needs = self._needs.setdefault((job.model, job.workload), new)
        shortage = self._shortage(needs.of_ours(networks))
        if shortage:
            return job.row._replace(remark=f"refused: {shortage}")
        if settings.compiles:
            torch.compiler.reset()  # else the code for one size gives way to slower code for any size
        runs = job.case.build(self._pair(job), job.workload, settings.seed)
        shortage = self._shortage(needs.of_theirs(networks))
        if shortage:
            runs = runs._replace(theirs=None)
        measured = measure(runs, settings.rounds, settings.device, settings.compiles)
        remark = None
        if measured.theirs is None:
            remark = f"without diffusers: {shortage or measured.failure or 'it has no such thing'}"
        is_rounded = settings.float8 and "transformer" in networks
        bound = FLOAT8_BOUND if is_rounded else bound_for(settings.dtype, settings.device)
        agrees = measured.agreement is None or measured.agreement.holds(bound)
        return job.row._replace(measured=measured, agrees=agrees, remark=remark)

    def _shortage(self, needed: int) -> str | None:
        """What is missing, in words, if anything is."""
        if needed <= self._free:
            return None
        return f"it needs {readable_bytes(needed)}, and {readable_bytes(self._free)} are free"

    def _pair(self, job: Job) -> Pair:
        settings = self.settings
        if self._twins is None or self._twins[0] != job.model:
            self._twins = None  # two models at once may be too much
            twins = Twins(
                configs=settings.models[job.model],
                dtype=settings.dtype,
                device=settings.device,
                seed=settings.seed,
                compiles=settings.compiles,
                float8=settings.float8,
            )
            self._twins = job.model, twins
        return self._twins[1].pair(job.case.networks)
