"""Amounts of memory, read and written."""

import pytest

from sana_sprint.sizes import byte_count, readable_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("8 gib", 2**33),
        ("8gb", 8 * 10**9),
        ("8G", 8 * 10**9),
        ("1.5kb", 1500),
        ("7", 7),
        (7, 7),
    ],
)
def test_sizes_are_read_with_their_unit(text, size):
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-5GB", "0MB", "5GBs", "0.5", "1e9", None, True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="8GiB, 5GB or 500MB"):
        byte_count(text)


@pytest.mark.parametrize(
    ("count", "text"), [(3_219_000_000, "3.22 GB"), (100_000_000, "0.10 GB"), (12_345_678, "12.3 MB")]
)
def test_sizes_are_written_in_the_unit_of_their_magnitude(count, text):
    assert readable_bytes(count) == text
