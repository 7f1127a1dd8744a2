"""A tensor that is made when its turn to be written comes, and a tensor's bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file to be written: what it is, and how it is made.

    Attributes:
        key: its name in the file.
        make: makes it, of this shape and dtype; called once, when everything before it has been written.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def made_bytes(self) -> memoryview:
        """The tensor, made, as bytes in the order of a contiguous one."""
        tensor = self.make()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), self.key
        return tensor_bytes(tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's numbers as they lie in memory, copied only if they are not contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
