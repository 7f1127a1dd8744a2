"""What a run says on the screen: one line for each warning and error, and nothing from other libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_COMMAND = "sana-sprint"

# Read by the libraries when they are imported, so they hold for what is imported inside `quiet_libraries` too.
_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
_CHATTY = ("accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "torch", "transformers")


def one_line(message: object) -> str:
    """A message without its line breaks."""
    return " ".join(str(message).split())


def describe_error(error: BaseException) -> str:
    """What went wrong, in one line; the class is named where the message alone was not written for a user."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, (ValueError, OSError, ImportError)) and str(error):
        return one_line(error)
    return one_line(f"{type(error).__name__}: {error} (--debug shows where)")


def report(kind: str, message: object) -> None:
    """Prints `sana-sprint: KIND: MESSAGE` on standard error, as one line."""
    print(f"{_COMMAND}: {kind}: {one_line(message)}", file=sys.stderr)


def is_terminal() -> bool:
    """Whether a person watches standard error, where the progress bars go."""
    return sys.stderr.isatty()


class _ReportHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        report(record.levelname.lower(), record.getMessage())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, warnings of this package are one line each and those of other libraries are not shown."""
    environment = {name: os.environ.get(name) for name in _QUIET}
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    ours = logging.getLogger("sana_sprint")
    propagates, handler = ours.propagate, _ReportHandler(logging.WARNING)
    os.environ.update(_QUIET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    ours.addHandler(handler)
    ours.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"sana_sprint(\.|$)")
            warnings.showwarning = _show_warning
            yield
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagates
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of `warnings.showwarning`, whose other parameters say where the warning comes from: ignored."""
    report("warning", message)
