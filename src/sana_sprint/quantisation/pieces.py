"""A matrix to its codes and scales in 8 or 4 bits, on the CPU: piece by piece, with little held beside them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Weights of a piece: a multiple of all block sizes of bitsandbytes, and 4 MiB in float32.
PIECE = 2**20


def _copy(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for place, value in zip(places, values):
        place.copy_(value)


def _in_4_bits(
    quantise: Callable, matrix: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes to a byte, (bytes, 1), and a scale per block."""
    weights = matrix.flatten()
    codes = torch.empty(-(-weights.numel() // 2), 1, dtype=torch.uint8)
    scales = torch.empty(-(-weights.numel() // blocksize))
    for piece, *places in zip(weights.split(PIECE), codes.split(PIECE // 2), scales.split(PIECE // blocksize)):
        _copy(places, quantise(piece, blocksize, quant_type, torch.uint8))
    return codes.flatten().view(quant_storage)[:, None], scales


def _in_8_bits(
    quantise: Callable, matrix: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (rows, columns), a scale per row, and the outliers that are left out where there is a threshold."""
    if threshold:  # for inputs: outliers are columns, and those of one piece are not those of another
        return quantise(matrix, threshold)
    num_rows, num_columns = matrix.shape
    codes, scales = torch.empty_like(matrix, dtype=torch.int8), torch.empty(num_rows)
    at_once = max(PIECE // num_columns, 1)
    for piece, *places in zip(*(part.split(at_once) for part in (matrix, codes, scales))):
        _copy(places, quantise(piece))
    return codes, scales, None


_IN_PIECES: dict[str, Callable] = {
    "bitsandbytes.quantize_4bit.default": _in_4_bits,
    "bitsandbytes.int8_vectorwise_quant.default": _in_8_bits,
}


class InPieces(TorchDispatchMode):
    """Inside, what bitsandbytes quantises on the CPU it quantises in pieces, to the same bits.

    Its kernels for the CPU hold several copies of a matrix in float32. glibc's malloc lays the codes of one matrix into
    the room of the last one's copies, which then is too small for the next one's: a model in 4 bits grows to several
    times its size, and stays there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        in_pieces = _IN_PIECES.get(str(func))
        if in_pieces is not None and args[0].device.type == "cpu":
            return in_pieces(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
