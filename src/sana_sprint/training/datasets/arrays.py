"""Arrays to the bytes of .npy files, and such bytes, or their header alone, back."""

from io import BytesIO

import numpy as np
from numpy.lib import format as npy

from sana_sprint.training.datasets.records import Span

_EXPONENT = np.uint16(0x7C00)  # of float16
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def is_finite(array: np.ndarray) -> bool:
    """Whether no number of an array of floats is infinite or NaN."""
    if array.dtype == np.float16:
        # Their exponents are all ones. numpy's own test takes forty times as long for this dtype.
        return bool((array.view(np.uint16) & _EXPONENT).max() < _EXPONENT)
    return bool(np.isfinite(array).all())


def to_bytes(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def array_shape(span: Span) -> tuple[int, ...]:
    """Shape of an array, from its header alone.

    Raises:
        ValueError: if that is no array, or is not as long as its header says.
    """
    with span.path.open("rb") as stream:
        stream.seek(span.offset)
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"arrays must be .npy of version 1.0 or 2.0, got {version}")
        shape, _, dtype = _HEADERS[version](stream)
        found, wanted = span.offset + span.size - stream.tell(), int(np.prod(shape)) * dtype.itemsize
    if found != wanted:
        raise ValueError(f"an array {shape} of {dtype} must take {wanted} bytes, got {found}")
    return shape


def read_array(span: Span, num_dimensions: int) -> np.ndarray:
    """An array of finite numbers.

    Raises:
        ValueError: if it is anything else, or has another number of dimensions.
    """
    array = np.load(BytesIO(span.read()), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim != num_dimensions or array.dtype.kind != "f":
        found = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"wanted an array of floats with {num_dimensions} dimensions, got {found}")
    if not is_finite(array):
        raise ValueError("holds numbers that are not finite")
    return array
