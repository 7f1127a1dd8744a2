"""A destination to a place beside it where the output grows, and from which it is moved there whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sana_sprint.checkpoints.reader import CONFIG_FILE, PIPELINE_FILE
from sana_sprint.checkpoints.writer import ORIGINAL_ENDINGS

_LOCK, _REPLACED = "lock", "replaced"


@contextmanager
def staged(output: Path, *, force: bool = False, num_bytes: int = 0) -> Iterator[Path]:
    """A path to write a file or folder to; it becomes `output` when the block ends without an error.

    It lies in a hidden folder beside `output` that is gone afterwards. Only a process that is killed leaves it, and
    the next run to the same output clears it away.

    Args:
        output: the destination. Missing folders above it are made.
        force: replace what is there. It stays untouched until the new output is complete.
        num_bytes: how much will be written, to be refused at once where there is no room for it.

    Raises:
        ValueError: if `output` exists and may not be replaced, or another run is writing to it.
        OSError: if there is no room, or what else the system refuses.
    """
    output = output.expanduser().absolute()
    made = _make_parents(output)
    stage = output.with_name(f".{output.name}.partial")
    try:
        with _taken(stage, output):
            _restore(stage, output)
            check_destination(output, force)
            _check_room(output, num_bytes)
            yield stage / output.name
            _exchange(stage, output)
    except OSError as error:
        if error.strerror and error.filename is None:  # of a write, which does not know where to
            error.filename = str(output)
        raise
    finally:
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()


def check_destination(output: Path, force: bool) -> None:
    """Raises ValueError if what is there may not be replaced."""
    if not os.path.lexists(output):
        return
    if not force:
        raise ValueError(f"{output} exists already; --force replaces it")
    if not output.is_dir():
        if output.suffix not in ORIGINAL_ENDINGS:
            raise ValueError(f"{output} is no checkpoint and no folder, and --force does not replace it")
        return
    is_checkpoint = (output / CONFIG_FILE).is_file() or (output / PIPELINE_FILE).is_file()
    if not is_checkpoint and any(output.iterdir()):
        raise ValueError(f"{output} is a folder of something else, which --force does not replace: no {CONFIG_FILE}")


def _make_parents(output: Path) -> list[Path]:
    """Makes the folders above; returns those that were missing, the deepest first."""
    missing = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _taken(stage: Path, output: Path) -> Iterator[None]:
    """Inside, the folder `stage` is there and of this process alone; afterwards it is gone."""
    stage.mkdir(exist_ok=True)
    is_ours = False
    try:
        with (stage / _LOCK).open("w") as lock:
            is_ours = _lock(lock)
            if not is_ours:
                raise ValueError(f"another run is writing to {output}")
            yield
    finally:
        if is_ours:
            shutil.rmtree(stage)


def _restore(stage: Path, output: Path) -> None:
    """Clears away what a killed run left, or puts back what it was about to replace."""
    if (stage / _REPLACED).exists() and not os.path.lexists(output):
        (stage / _REPLACED).rename(output)
    _clear(stage)


def _lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows; there, a folder with an open file in it cannot be taken away anyhow
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear(stage: Path) -> None:
    for entry in stage.iterdir():
        if entry.name != _LOCK:
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_room(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        reason = f"{output} would need {num_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there"
        raise OSError(reason)


def _exchange(stage: Path, output: Path) -> None:
    """Moves the new output to its destination, and what was there out of the way, or back if that fails."""
    if not os.path.lexists(output):
        (stage / output.name).rename(output)
        return
    output.rename(stage / _REPLACED)
    try:
        (stage / output.name).rename(output)
    except BaseException:
        (stage / _REPLACED).rename(output)
        raise
