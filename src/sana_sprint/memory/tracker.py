"""A piece of code to the most bytes that its tensors held at once; on the meta device without holding any."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Inside, counts the storage of every tensor that is made, until it is freed.

    Operations run one after the other, as without compilation. What a kernel takes for itself while it runs (the
    workspace of a convolution) is not seen.

    Attributes:
        peak: the most bytes that were held at once. Storages that existed before do not count: they are weights and
            inputs, which the caller knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        # Held, so that no storage that is made gets the address of one of these.
        self._given: dict[int, torch.UntypedStorage] = {}

    @property
    def held(self) -> int:
        """The bytes that are held now."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.held)
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
