"""A file in the safetensors format to its tensors, read when they are used; and tensors to such a file, one by one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sana_sprint.checkpoints.entries import Entry
from sana_sprint.checkpoints.rules import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The header is padded so that the first tensor is aligned; 8 bytes are the format's own unit.
_HEADER_UNIT = 8


class SafetensorsFile:
    """The tensors of a .safetensors file.

    Raises:
        ValueError: if header and data do not fit together, or a dtype is none of `DTYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        self.tensors = {key: self._info(key) for key in self._handle.keys()}  # noqa: SIM118 -- no mapping

    def _open(self) -> None:
        try:
            self._handle = safe_open(str(self.path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path} is no intact safetensors file: {error}") from None

    def _info(self, key: str) -> TensorInfo:
        part = self._handle.get_slice(key)
        dtype = part.get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {key} is of dtype {dtype}, which is not supported")
        return TensorInfo(tuple(part.get_shape()), DTYPES[dtype])

    def read(self, key: str) -> torch.Tensor:
        """A view of the file; to be left as it is."""
        return self._handle.get_tensor(key)

    def remap(self) -> None:
        """Map the file afresh: pages that were read no longer count towards the memory of this process."""
        self._open()

    def check_data(self) -> None:
        """Nothing: the format has no checksums."""


def write_safetensors(path: Path, entries: Sequence[Entry], advance: Callable[[int], object]) -> None:
    """Writes tensors one after the other; `advance` is told the bytes of each.

    Tensors of wide dtypes come first, which keeps all of them aligned.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.num_bytes
        header[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_UNIT)
    with path.open("xb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in ordered:
            stream.write(entry.made_bytes())
            advance(entry.num_bytes)
