"""Python's search for cyclic garbage, kept away from what a process imports and needs to its end."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def long_lived() -> Iterator[None]:
    """Inside, nothing is searched for garbage; what is made inside counts as old afterwards, and so is searched rarely.

    torch, diffusers and transformers come to a million objects. Python would go through all of them, again and again,
    while they are imported, and once more before it ends.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Together they put all objects into the oldest generation; neither looks at one.
        gc.freeze()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
        # The memory goes back with the process anyway.
        atexit.register(gc.freeze)
