"""A file of torch.save to its tensors, without running anything that it holds; and tensors to such a file."""

import io
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.entries import Entry
from sana_sprint.checkpoints.rules import TensorInfo

_CHUNK_BYTES = 2**24

# What zipfile raises over a damaged archive: RuntimeError for one that seems to be encrypted, OSError for a place
# before the start of the file, and so on.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OverflowError, OSError)

# torch.save aligns tensors so that a mapped file can be used as memory.
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20
_FIELD_HEADER_BYTES = 4
_PADDING_FIELD = b"FB"  # torch's own

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
}


class _Skipped:
    """Stands for numpy's arrays and numbers, which training snapshots keep beside the weights: nothing is built."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_SKIPPED = [
    (_Skipped, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in (f"{module}._reconstruct", f"{module}.scalar")
] + [(_Skipped, "numpy.ndarray"), (_Skipped, "numpy.dtype")]


class TorchFile:
    """The state dict of a .pth file. Tensors are views of the mapped file, and read when they are used.

    Args:
        path: The file.
        ema: Take the averaged weights, `state_dict_ema`, and not `state_dict`.

    Raises:
        ValueError: if the file is damaged, needs code of its own to be run, or holds no state dict.
    """

    def __init__(self, path: Path, ema: bool = False) -> None:
        self.path = path
        self._ema = ema
        _check_archive(path)
        self._tensors = self._load()

    def _load(self) -> dict[str, torch.Tensor]:
        return _state_dict(_unpickle(self.path), self._ema, self.path)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        """A view of the file; to be left as it is."""
        return self._tensors[key]

    def remap(self) -> None:
        """Map the file afresh: pages that were read no longer count towards the memory of this process."""
        self._tensors = {}
        self._tensors = self._load()

    def check_data(self) -> None:
        """Compare every byte with the checksums of the archive. Raises ValueError if one differs."""
        with zipfile.ZipFile(self.path) as archive:
            for record in archive.infolist():
                _check_record(archive, record, self.path)


def _check_archive(path: Path) -> None:
    """Refuse what torch.save did not write, and a table of contents or an index that was damaged since."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename.partition("/")[2] for record in records]
            if "constants.pkl" in names:
                raise ValueError(f"{path} is a TorchScript program and no checkpoint: it would have to be run")
            if names.count("data.pkl") != 1 or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError(f"{path} is a zip archive, but torch.save did not write it")
            for record, name in zip(records, names):
                if not name.startswith("data/"):
                    _check_record(archive, record, path)
    except _DAMAGE as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None


def _check_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: Path) -> None:
    # torch.serialization.set_crc32_options(False) writes zeros, and they say nothing.
    if record.CRC == 0:
        return
    try:
        with archive.open(record) as stream:
            while stream.read(_CHUNK_BYTES):
                pass
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([*_SKIPPED]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged pickle makes torch stumble over
        raise ValueError(_why_not(error, path)) from None


def _why_not(error: Exception, path: Path) -> str:
    if isinstance(error, pickle.UnpicklingError):
        try:
            wanted = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:  # its pickle is beyond reading
            wanted = []
        wanted = [name for name in wanted if name not in {skipped for _, skipped in _SKIPPED}]
        if wanted:
            return (
                f"{path} is refused: to open it, {', '.join(wanted[:3])} would have to be called, and nothing that a"
                " checkpoint names is ever run"
            )
    # torch wraps the reason in advice to load the file without any care.
    reasons = re.findall(r"WeightsUnpickler error: (.+)", str(error)) or str(error).splitlines()[-1:]
    return f"{path} is damaged: torch cannot read its index ({': '.join([type(error).__name__, *reasons])})"


def _state_dict(root: Any, ema: bool, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, of the entry asked for, or of the root if it is no wrapper."""
    if not isinstance(root, Mapping):
        raise ValueError(f"{path} holds a {type(root).__name__} and no state dict")
    if ema and "state_dict_ema" not in root:
        raise ValueError(f"{path} holds no averaged weights: there is no state_dict_ema in it")
    name = "state_dict_ema" if ema else "state_dict"
    tensors = root.get(name, root)
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{path} holds no tensors")
    strange = [key for key, value in tensors.items() if not isinstance(key, str) or not _is_plain(value)]
    if strange:
        raise ValueError(f"{path} holds no state dict: {str(strange[0])[:80]!r} is no tensor of plain numbers")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


class _StorageMark:
    """Stands for the numbers of a tensor while the index is pickled."""

    def __init__(self, persistent_id: tuple) -> None:
        self.persistent_id = persistent_id


class _TensorMark:
    """Pickled as the call that makes a tensor of its numbers, as torch.save has it."""

    def __init__(self, entry: Entry, key: int) -> None:
        steps = accumulate([*reversed(entry.shape[1:])], mul, initial=1)
        strides = tuple(reversed([*steps])) if entry.shape else ()
        storage = _StorageMark(("storage", _STORAGES[entry.dtype], str(key), "cpu", entry.num_elements))
        self._arguments: tuple[Any, ...] = (storage, 0, entry.shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Callable, tuple]:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _IndexPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _StorageMark) else None


def write_torch(path: Path, entries: Sequence[Entry], advance: Callable[[int], object]) -> None:
    """Writes {"state_dict": tensors} as torch.save does, but one tensor after the other.

    `advance` is told the bytes of each. The file can be mapped, and carries checksums.
    """
    index = io.BytesIO()
    marks = OrderedDict((entry.key, _TensorMark(entry, key)) for key, entry in enumerate(entries))
    _IndexPickler(index, protocol=2).dump({"state_dict": marks})
    with path.open("xb") as stream, zipfile.ZipFile(stream, "w") as archive:
        _write_record(archive, f"{path.stem}/data.pkl", index.getbuffer())
        _write_record(archive, f"{path.stem}/byteorder", sys.byteorder.encode())
        for key, entry in enumerate(entries):
            _write_record(archive, f"{path.stem}/data/{key}", entry.made_bytes())
            advance(entry.num_bytes)
        _write_record(archive, f"{path.stem}/version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, data: memoryview | bytes) -> None:
    record = zipfile.ZipInfo(name)
    start = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + _ZIP64_FIELD_BYTES  # type: ignore[union-attr]
    padding = -(start + _FIELD_HEADER_BYTES) % _ALIGNMENT
    record.extra = _PADDING_FIELD + padding.to_bytes(2, "little") + bytes(padding)
    # Always with the field for large sizes, so that every header is of a known length.
    with archive.open(record, "w", force_zip64=True) as stream:
        stream.write(data)
