"""What happens in a training run to its log, TensorBoard and the progress bar."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from sana_sprint.files import write_whole
from sana_sprint.training.settings import LoopSettings


class Journal:
    """`log.jsonl`, one line for each step that is reported, and a progress bar; scalars for TensorBoard if asked for.

    Args:
        folder: where the log is, and scalars below `tensorboard`; None on a process that keeps no journal. What an
            earlier run wrote of steps after `done` is removed, for this run comes to them again.
        title: shown before the progress bar.
        done: how many steps are done.
        settings: of the run.

    Raises:
        ImportError: if scalars are asked for without the package that writes them.
    """

    def __init__(self, folder: Path | None, title: str, done: int, settings: LoopSettings) -> None:
        self.batch_size = settings.batch_size
        self.log, self.scalars = None, None
        if folder is not None:
            self.log = folder / "log.jsonl"
            _forget_after(self.log, done)
            self.scalars = _summary_writer(folder / "tensorboard", done) if settings.tensorboard else None
        self.bar = tqdm(
            total=settings.steps,
            initial=done,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            # On a terminal only, and there by one process.
            disable=None if folder is not None else True,
        )
        self.reported_step, self.reported_at = done, time.monotonic()
        self.advanced_at = self.reported_at

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.scalars is not None:
            self.scalars.close()

    def advance(self) -> None:
        """One more step is done."""
        self.advanced_at = time.monotonic()
        self.bar.update()

    def report(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step, and images per second since the last report; null for what is not finite."""
        if self.log is None:
            return
        images = self.batch_size * (step - self.reported_step) / (self.advanced_at - self.reported_at)
        self.reported_step, self.reported_at = step, time.monotonic()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        entry = {"step": step, **dict.fromkeys(values), **finite, "images_per_second": images}
        entry = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in entry.items()}
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {images:.1f} images/s")
        if self.scalars is not None:
            for name, value in {**finite, "images_per_second": images}.items():
                self.scalars.add_scalar(name, value, step)


def _forget_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and the rest of a line that was never finished."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    write_whole(path, lambda partial: partial.write_text(kept, encoding="utf-8"))


def _summary_writer(folder: Path, done: int) -> Any:
    try:
        # Late, for the package is optional.
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("scalars for TensorBoard need its package: pip install 'sana-sprint[train]'") from error
    return SummaryWriter(folder, purge_step=done + 1)
