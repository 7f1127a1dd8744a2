"""What a process has freed to the system, at once: so that it takes no more than its tensors do."""

import ctypes
import platform

# Of mallopt in glibc's malloc.h, and of a tensor that is large.
_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2**20


def give_back_what_is_freed() -> None:
    """From here on, and for the whole process, tensors of 1 MiB and more come from the system and go back to it.

    By itself glibc's malloc keeps those of less than 32 MiB in its heap, where aligned memory often does not fit into
    the place of what was freed. What comes and goes in the quantised products of one picture takes up to 2 GB so, for
    good; without it a decode takes 30 % more processor time. With other C libraries this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
