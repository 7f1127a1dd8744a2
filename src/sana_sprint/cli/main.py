"""The command line to an exit code: chooses the subcommand, runs it, and says in one line what went wrong."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from sana_sprint import __version__
from sana_sprint.cli import (
    bench,
    cache_latents,
    convert,
    evaluate,
    generate,
    inspect,
    plan,
    screen,
    search_timesteps,
    train,
)

_ERROR, _INTERRUPTED, _PIPE_CLOSED = 2, 130, 141  # the last two as shells have them: 128 + the signal's number


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of this command."""

    def error(self, message: str) -> NoReturn:
        screen.report("error", f"{message}; see {self.prog} --help")
        sys.exit(_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; the options of a subcommand are declared in its own file."""
    parser = _Parser(
        prog="sana-sprint",
        description="Text to pictures in one to four steps, with SANA-Sprint.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sana-sprint {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module, name, summary in (
        (generate, "generate", "draw pictures from prompts"),
        (cache_latents, "cache-latents", "encode pictures and captions ahead, for training"),
        (train, "train", "train a checkpoint"),
        (evaluate, "evaluate", "score a model on captions of the shapes world, or pictures of any"),
        (search_timesteps, "search-timesteps", "find the angles that a model draws best with"),
        (convert, "convert", "turn a checkpoint into another layout"),
        (inspect, "inspect", "say what a checkpoint is, and what is wrong with it"),
        (plan, "plan", "say how a model fits the memory of a machine"),
        (bench, "bench", "measure speed and memory beside diffusers"),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or the process's own, and returns its exit code.

    0 is success, 1 a finding that a command counts as failure, 2 an error, which is one line on standard error, and 130
    an interruption by Ctrl-C.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    try:
        code = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        screen.report("interrupted", "nothing was left half written")
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return _PIPE_CLOSED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        screen.report("error", screen.describe_error(error))
        return _ERROR
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
