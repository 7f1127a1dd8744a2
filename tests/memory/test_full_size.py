"""What a full-size pipeline takes on a CPU while it loads and while it draws, against its plan.

Transformer and autoencoder are those of Sprint 1.6B; of the text encoder's 26 layers there are four, and the picture
has 512 pixels, which a CPU draws in a tenth of the time. The plan is made from the same configs.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what the most was that was resident"),
]
SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_memory.py"


def run(*arguments: str) -> dict[str, Any]:
    """What the script measures in a process of its own."""
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    """Random weights of 6 GB, which pytest would keep in its own folders."""
    with TemporaryDirectory() as name:
        run("weights", name, "--text-layers", "4")
        yield name


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_picture_takes_what_was_planned_within_a_tenth(folder, quantization):
    measured = run("one-drawing", folder, "--case", quantization, "--size", "512")
    assert measured["resident"] == pytest.approx(measured["planned"], rel=0.1)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_loading_takes_no_more_than_drawing(folder, quantization):
    measured = run("one-loading", folder, "--case", quantization, "--size", "512")
    assert measured["own"] <= measured["planned"]
