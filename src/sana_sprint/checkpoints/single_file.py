"""A checkpoint in one file, of either layout, to a model of ours: what `from_single_file` does."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sana_sprint.checkpoints.hub import find_source
from sana_sprint.checkpoints.inspect import CLASSES, identify, plan_for, refuse_inexact
from sana_sprint.checkpoints.plan import Plan
from sana_sprint.checkpoints.reader import COMPONENTS, Checkpoint, open_checkpoint
from sana_sprint.checkpoints.rules import Kind, TensorInfo
from sana_sprint.plugin import fill_quantised

logger = logging.getLogger(__name__)

# Dtypes of quantised weights, but for those that are made of several tensors.
_CODES = (torch.int8, torch.uint8)


class _InMemory(Checkpoint):
    """A state dict that the caller has loaded."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        super().__init__(Path("the state dict"), [], None)
        self._tensors = state_dict.get("state_dict", state_dict)
        if strange := [key for key, value in self._tensors.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(f"{self.path} holds something else than tensors: {strange[0]!r}")
        self.tensors = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self._tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key]


class _Converted(Mapping[str, torch.Tensor]):
    """The tensors of a model, each read and converted when it is looked up; they may be parts of the file."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._read = checkpoint.read
        self._moves = {move.target: move for move in plan.moves}

    def __getitem__(self, name: str) -> torch.Tensor:
        move = self._moves[name]
        return move.apply([self._read(key) for key in move.sources])

    def __iter__(self) -> Iterator[str]:
        return iter(self._moves)

    def __len__(self) -> int:
        return len(self._moves)


def _kind_of(cls: type) -> Kind:
    kinds: dict[str, Kind] = {name: kind for kind, name in CLASSES.items()}  # type: ignore[misc]
    return next(kinds[parent.__name__] for parent in cls.__mro__ if parent.__name__ in kinds)


@torch.no_grad()
def load_single_file(
    cls: Any,
    source: str | os.PathLike | Mapping[str, Any] | None,
    *,
    config: str | os.PathLike | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    config_revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    original_config: Any = None,
    quantization_config: Any = None,
    device_map: Any = None,
    low_cpu_mem_usage: bool = True,
    disable_mmap: bool = False,
    proxies: Any = None,
    **settings: Any,
) -> Any:
    """A model with the weights of a file in the original layout, or in diffusers'.

    What the tensors show, `config` and `settings` need not say; what is guessed is warned of. The weights never lie
    in memory twice.

    Args:
        cls: the class of the model.
        source: the file, a folder, a link to a file of the hub, "owner/name/path/in/it", or a state dict.
        config: folder or repository of a config.json that tells what tensors cannot. `subfolder` is the place in it.
        dtype, torch_dtype: of the weights; float32 if none is given, as in diffusers.
        device: where they go; the CPU if none is given.
        quantization_config: of diffusers, as for `from_pretrained`, which then chooses dtype and device too if none is
            given.
        revision, config_revision, cache_dir, token, force_download, local_files_only: of what the hub has.
        original_config, device_map: not available here, and refused.
        low_cpu_mem_usage, disable_mmap, proxies: ignored; memory is low at all times, and the hub's client takes
            proxies from the environment.
        **settings: entries of the config, such as `sample_size=16`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no complete model of this class, or for arguments that are refused.
    """
    if source is None:
        raise ValueError("from_single_file needs a file, a link to one, or a state dict")
    for name, value in (("original_config", original_config), ("device_map", device_map)):
        if value is not None:
            raise ValueError(
                f"from_single_file takes no {name} here; convert the file with sana-sprint convert, and give device_map"
                " to from_pretrained"
            )
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    if config is not None:
        known = cls.load_config(config, subfolder=subfolder, revision=config_revision, **hub)
        of_the_model = {name for name in known if not name.startswith("_") and name != "quantization_config"}
        settings = {**{name: known[name] for name in of_the_model}, **settings}
    with ExitStack() as stack:
        if isinstance(source, Mapping):
            checkpoint: Checkpoint = _InMemory(source)
        else:
            path = find_source(os.fspath(source), revision=revision, force_download=force_download, **hub)
            checkpoint = stack.enter_context(open_checkpoint(path, component=COMPONENTS[_kind_of(cls)]))
        return _load(cls, checkpoint, settings, quantization_config, dtype or torch_dtype, device)


def _load(
    cls: Any,
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    quantization_config: Any,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> Any:
    from accelerate import init_empty_weights

    family = identify(checkpoint, settings, kind=_kind_of(cls))
    plan = plan_for(checkpoint, family, "diffusers")
    refuse_inexact(checkpoint, family, plan)
    checkpoint.check_data()
    for doubt in family.ambiguous:
        logger.warning("%s: %s", checkpoint.path, doubt)
    with init_empty_weights():  # buffers that no file holds are computed all the same
        model = cls.from_config(family.config)
    tensors = _Converted(checkpoint, plan)
    # What the model holds is copied, for the file may be closed, or change; codes are no part of it.
    if quantization_config is not None:
        model = fill_quantised(model, tensors, quantization_config, dtype, device)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype not in _CODES and not hasattr(tensor, "__tensor_flatten__"):
                tensor.data = tensor.data.clone()
        return model.eval()
    dtype, device = dtype or torch.get_default_dtype(), device or "cpu"
    state = {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval()
