"""Arrays as files: headers read alone, and everything that is no whole array of finite numbers refused."""

import io

import numpy as np
import pytest

from sana_sprint.training.datasets.arrays import array_shape, is_finite, read_array, to_bytes
from sana_sprint.training.datasets.records import Span


@pytest.fixture
def span(tmp_path):
    """Puts bytes in the middle of a file, and returns where they are."""

    def make(content: bytes) -> Span:
        (tmp_path / "file").write_bytes(b"before" + content + b"after")
        return Span(tmp_path / "file", 6, len(content))

    return make


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_as_it_was_written(dtype, order, span):
    array = np.asarray(np.random.default_rng(0).standard_normal((4, 6, 5)), dtype, order=order)
    written = span(to_bytes(array))
    assert array_shape(written) == (4, 6, 5)
    assert np.array_equal(read_array(written, 3), array)


def test_every_version_of_the_header_that_numpy_writes_for_numbers_is_read(span):
    for version in ((1, 0), (2, 0)):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.zeros((2, 3)), version)
        assert array_shape(span(stream.getvalue())) == (2, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("value", "finite"), [(np.inf, False), (-np.inf, False), (np.nan, False), (-65504, True)])
def test_one_number_that_is_not_finite_is_found(dtype, value, finite):
    array = np.zeros((3, 100), dtype)
    array[1, 57] = value
    assert is_finite(array) is finite


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "magic"),
        (b"\x93NUMPY\x01\x00", "EOF"),
        (b"\x93NUMPY\x03\x00" + to_bytes(np.zeros(3))[8:], "version 1.0 or 2.0, got"),
        (to_bytes(np.zeros((4, 6)))[:-1], "must take 192 bytes, got 191"),
        (to_bytes(np.zeros((4, 6))) + b"x", "must take 192 bytes, got 193"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(content, named, span):
    with pytest.raises(ValueError, match=named):
        array_shape(span(content))


def test_what_is_no_array_of_finite_numbers_is_refused(span):
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    for content, named in (
        (to_bytes(np.zeros((2, 3))), "3 dimensions, got \\(2, 3\\)"),
        (to_bytes(np.zeros((2, 3, 4), int)), "array of floats"),
        (to_bytes(np.full((2, 3, 4), np.nan)), "not finite"),
        (archive.getvalue(), "an archive"),
    ):
        with pytest.raises(ValueError, match=named):
            read_array(span(content), 3)


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(ValueError, match="cut off after 2 of 7 bytes"):
        Span(tmp_path / "file", 3, 7).read()
