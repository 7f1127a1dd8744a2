"""A checkpoint file or folder to its tensors: what they are at once, what they hold one at a time."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.rules import Kind, TensorInfo
from sana_sprint.checkpoints.safetensors_file import SafetensorsFile
from sana_sprint.checkpoints.torch_file import TorchFile

# Beside a model in diffusers' layout: tensors of the original file that the model has no place for.
ASIDE_FILE = "original_extras.safetensors"
CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"
# How weights are called in diffusers' layout, before the ending, and the number of a shard or the name of a variant.
WEIGHTS_NAME = "diffusion_pytorch_model"
# Subfolders of a pipeline.
COMPONENTS: dict[Kind, str] = {"transformer": "transformer", "autoencoder": "vae", "controlnet": "controlnet"}

_INDEX_ENDING = ".safetensors.index.json"
_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# Of several variants in one folder, what from_pretrained of diffusers and transformers loads by default.
_PLAIN_NAMES = {name + ending for name in (WEIGHTS_NAME, "model") for ending in (".safetensors", _INDEX_ENDING)}

# A mapped file counts towards this process's memory as far as it was read; it is mapped afresh after so much.
_REMAP_BYTES = 2**25

# How files begin.
_ZIP, _PICKLE, _LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # a pickled magic number


class Checkpoint:
    """The tensors of one model, in one file or several, by name.

    Attributes:
        path: the file, index or folder that holds them.
        config: of a folder with a config.json; None elsewhere.
        tensors: what every tensor is.
    """

    def __init__(self, path: Path, files: list[TorchFile | SafetensorsFile], config: dict[str, Any] | None) -> None:
        self.path = path
        self.config = config
        self._homes = {key: file for file in files for key in file.tensors}
        self._files = files
        self._bytes_read = 0
        self.tensors: dict[str, TensorInfo] = {key: info for file in files for key, info in file.tensors.items()}

    @property
    def paths(self) -> list[Path]:
        """The files that the tensors are in."""
        return [file.path for file in self._files]

    def read(self, key: str) -> torch.Tensor:
        """The tensor of this name, as it is in the file; to be used and let go, and not to be written to."""
        if self._bytes_read > _REMAP_BYTES:
            for file in self._files:
                file.remap()
            self._bytes_read = 0
        tensor = self._homes[key].read(key)
        self._bytes_read += tensor.nbytes
        return tensor

    def check_data(self) -> None:
        """Compare all data with the checksums that .pth files carry; .safetensors files have none.

        Raises:
            ValueError: if the data was altered after the file was written.
        """
        for file in self._files:
            file.check_data()

    def close(self) -> None:
        """Let the files go. Tensors that are still in use keep theirs."""
        self._homes.clear()
        self._files.clear()


@contextmanager
def open_checkpoint(
    path: str | os.PathLike, *, ema: bool = False, component: str | None = None
) -> Iterator[Checkpoint]:
    """The checkpoint at `path`, open as long as the `with` block runs.

    Args:
        path: a file of torch.save or in the safetensors format, the index of one in several files, or a folder with
            one of these; of a pipeline's folder, `component`. What lies beside a file or index named as diffusers
            names them, belongs to it as if the folder had been named.
        ema: the averaged weights of a training snapshot.
        component: subfolder of a pipeline's folder; None for its transformer.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: in one line, for anything but an intact checkpoint of tensors and plain values.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {place}")
    folder: Path | None
    if place.is_dir():
        folder = place = _component_folder(place, component)
        weights = _weights_in(place)
    else:
        folder = place.parent if place.name.startswith(WEIGHTS_NAME) else None
        weights = place
    config = _read_config(folder) if folder else None
    files = _open_weights(weights, ema)
    if ema and not any(isinstance(file, TorchFile) for file in files):
        raise ValueError(f"{weights} holds no averaged weights: only training snapshots of torch.save do")
    if folder and (folder / ASIDE_FILE).is_file():
        files.append(_open_file(folder / ASIDE_FILE, ema=False))
    _refuse_doubles(files)
    if not any(file.tensors for file in files):
        raise ValueError(f"{weights} is empty: it holds no tensors")
    checkpoint = Checkpoint(place, files, config)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def component_folders(folder: Path) -> list[str]:
    """Which components of a pipeline's folder hold models that this package converts."""
    return [name for name in COMPONENTS.values() if (folder / name / CONFIG_FILE).is_file()]


def _component_folder(folder: Path, component: str | None) -> Path:
    name = component or COMPONENTS["transformer"]
    if (folder / name / CONFIG_FILE).is_file():
        return folder / name
    if (folder / PIPELINE_FILE).is_file():
        raise ValueError(f"{folder} is a pipeline, but {name}/{CONFIG_FILE} is missing")
    return folder


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG_FILE
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but {type(value).__name__}")
    return value


def _weights_in(folder: Path) -> Path:
    """The one file that a folder's weights are read from: an index if there is one."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name != ASIDE_FILE)
    indices = [name for name in names if name.endswith(_INDEX_ENDING)]
    found = indices or [name for name in names if name.endswith(_ENDINGS)]
    if not found:
        raise ValueError(f"{folder} holds no weights: no file ends in {', '.join((*_ENDINGS, _INDEX_ENDING))}")
    if len(found) > 1:
        found = [name for name in found if name in _PLAIN_NAMES] or found
    if len(found) > 1:
        raise ValueError(f"{folder} holds several checkpoints, name one of them: {', '.join(found[:6])}")
    return folder / found[0]


def _open_weights(path: Path, ema: bool) -> list[TorchFile | SafetensorsFile]:
    if not path.name.endswith(".index.json"):
        return [_open_file(path, ema)]
    if not path.name.endswith(_INDEX_ENDING):
        raise ValueError(f"{path} is an index of another format: wanted a name that ends in {_INDEX_ENDING}")
    homes = read_json(path).get("weight_map")
    if not isinstance(homes, dict) or not homes or not all(isinstance(name, str) for name in homes.values()):
        raise ValueError(f"{path} names no shards: it has no weight_map of file names")
    return [_open_shard(path, shard, homes) for shard in sorted(set(homes.values()))]


def _open_shard(index: Path, shard: str, homes: Mapping[str, str]) -> SafetensorsFile:
    if Path(shard).name != shard:
        raise ValueError(f"{index} names a shard outside its folder: {shard!r}")
    path = index.parent / shard
    if not path.is_file():
        raise ValueError(f"{index} names a shard that is not there: {shard}")
    file = _open_file(path, ema=False)
    if not isinstance(file, SafetensorsFile):
        raise ValueError(f"{path} is no safetensors file, as its index says")
    listed = {key for key, home in homes.items() if home == shard}
    if astray := sorted(listed ^ file.tensors.keys()):
        raise ValueError(f"{index} and {shard} disagree about {len(astray)} tensors, {astray[0]} among them")
    return file


def _open_file(path: Path, ema: bool) -> TorchFile | SafetensorsFile:
    """Opens a file by what it holds: endings are not to be relied on."""
    with path.open("rb") as stream:
        start = stream.read(len(_LFS))
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(_ZIP):
        if path.suffix == ".safetensors":  # torch.load goes by the name
            raise ValueError(f"{path} is a file of torch.save under a name of safetensors: rename it to end in .pth")
        return TorchFile(path, ema)
    if start[8:9] == b"{":  # behind the length of the header
        return SafetensorsFile(path)
    if start.startswith(_LEGACY_TORCH):
        raise ValueError(
            f"{path} is in torch's format of before 1.6, which cannot be read tensor by tensor; load it with"
            " torch.load(..., weights_only=True) and save it again"
        )
    if start.startswith(_PICKLE):
        raise ValueError(f"{path} is refused: it is a plain pickle, which is a program that would have to be run")
    if start == _LFS:
        raise ValueError(f"{path} is a Git LFS pointer: the weights themselves were not downloaded")
    raise ValueError(f"{path} is no checkpoint: neither torch.save nor safetensors wrote it")


def _refuse_doubles(files: list[TorchFile | SafetensorsFile]) -> None:
    seen: set[str] = set()
    for file in files:
        if double := sorted(seen & file.tensors.keys()):
            raise ValueError(f"{file.path} holds {double[0]} once more: it is in another file of the checkpoint too")
        seen.update(file.tensors)
