"""What is made where Python's search for garbage is off: old at once, and found when it is garbage after all."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from sana_sprint.cli import collector

SOURCE = Path(__file__).parents[2] / "src"


class Knot:
    """Refers to itself, so that only the search for cyclic garbage can find that nothing else does."""

    def __init__(self) -> None:
        self.itself = self


def test_inside_nothing_is_searched_and_afterwards_it_is():
    with collector.long_lived():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_search_that_was_off_stays_off():
    gc.disable()
    try:
        with collector.long_lived():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_made_inside_is_old_afterwards():
    with collector.long_lived():
        made = Knot()
        assert not any(one is made for one in gc.get_objects(generation=2))
    assert any(one is made for one in gc.get_objects(generation=2))


def test_garbage_that_was_made_inside_is_found_later():
    with collector.long_lived():
        found = weakref.ref(Knot())
    assert found() is not None
    gc.collect()
    assert found() is None


def fail() -> None:
    with collector.long_lived():
        raise ZeroDivisionError


def test_after_an_error_the_search_is_on_and_nothing_exempt():
    with pytest.raises(ZeroDivisionError):
        fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_at_its_end_the_process_searches_nothing():
    program = f"""
import atexit, gc, sys
sys.path.insert(0, {str(SOURCE)!r})
from sana_sprint.cli import collector
atexit.register(lambda: print("left to search:", len(gc.get_objects())))
with collector.long_lived():
    made = [[] for _ in range(1000)]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert int(done.stdout.rpartition(":")[2]) < 100
