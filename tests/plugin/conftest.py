"""A published pipeline folder, and a fresh Python with the package on its path."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sana_sprint import SanaSprintPipeline

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="session")
def folder(tiny_pipeline_parts, tmp_path_factory) -> Path:
    """The tiny pipeline, saved by us."""
    where = tmp_path_factory.mktemp("tiny") / "pipeline"
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(where)
    return where


@pytest.fixture(scope="session")
def run_python(folder) -> Callable[[str], str]:
    """Runs a program in a fresh interpreter, where FOLDER is the pipeline folder, and returns what it prints."""

    def run(program: str) -> str:
        opening = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); FOLDER = {str(folder)!r}\n"
        command = [sys.executable, "-c", opening + program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
