"""Amounts of memory as people write them, and back."""

import re

_UNITS = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 10 ** (3 * _power), f"{_letter}B": 10 ** (3 * _power), f"{_letter}IB": 2 ** (10 * _power)}


def byte_count(size: str | int) -> int:
    """Bytes of "8GiB", "5GB", "5G" or "500 MB" (a factor of 1000, and of 1024 with an i), or of a number of bytes.

    Raises:
        ValueError: for anything else, 0 among it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    count = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if not count:
        raise ValueError(f"wanted a size such as 8GiB, 5GB or 500MB, got {size!r}")
    return count


def readable_bytes(count: float) -> str:
    """A number of bytes in GB of 10^9 or MB of 10^6."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
