"""A run's screen: one line for everything, and nothing of other libraries."""

import logging
import os
import warnings

import pytest

from sana_sprint.cli.screen import describe_error, quiet_libraries


def shout() -> None:
    logging.getLogger("diffusers.loading").warning("chatter")
    logging.getLogger("transformers.tokens").warning("chatter")
    warnings.warn_explicit("chatter", UserWarning, "file.py", 1, module="torch.nn.modules")


def test_other_libraries_are_silent_inside_and_as_before_outside(capsys, caplog):
    before = [logging.getLogger(name).level for name in ("diffusers", "transformers", "torch")]
    environment = dict(os.environ)
    with quiet_libraries():
        shout()
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert "chatter" not in capsys.readouterr().err + caplog.text
    assert [logging.getLogger(name).level for name in ("diffusers", "transformers", "torch")] == before
    assert dict(os.environ) == environment


def test_this_packages_log_and_warnings_are_one_line_each(capsys):
    with quiet_libraries():
        logging.getLogger("sana_sprint.text.encoder").warning("the prompt was cut:\n'tail'")
        warnings.warn_explicit("tiles\nare used", UserWarning, "file.py", 1, module="sana_sprint.pipelines.base")
        logging.getLogger("sana_sprint.text.encoder").info("detail")
    assert capsys.readouterr().err == (
        "sana-sprint: warning: the prompt was cut: 'tail'\nsana-sprint: warning: tiles are used\n"
    )
    assert logging.getLogger("sana_sprint").handlers == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("height must be 32,\n got 31"), "height must be 32, got 31"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "a.png: No such file or directory"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (OSError("the hub\ncannot be reached"), "the hub cannot be reached"),
        (KeyError("scheduler"), "KeyError: 'scheduler' (--debug shows where)"),
        (ValueError(), "ValueError: (--debug shows where)"),
    ],
)
def test_an_error_is_one_line_and_its_class_is_named_only_where_the_message_is_not_for_users(error, line):
    assert describe_error(error) == line
