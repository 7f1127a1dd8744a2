"""Matrices quantised in pieces: the bits that bitsandbytes gives, in hardly more memory than they take."""

import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from diffusers import PipelineQuantizationConfig
from torch.utils._python_dispatch import TorchDispatchMode

from sana_sprint import SanaSprintPipeline, embedded_checkpoint
from sana_sprint.quantisation import pieces
from sana_sprint.quantisation.pieces import PIECE, InPieces

# A little more than two pieces, whose last rows and blocks are no whole ones.
NUM_ROWS, NUM_COLUMNS = 2 * PIECE // 1000 + 5, 1000


class Largest(TorchDispatchMode):
    """Inside, notes the most weights that bitsandbytes quantises at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "quant" in str(func):
            self.num_weights = max(self.num_weights, args[0].numel())
        return func(*args, **(kwargs or {}))


def matrix() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_ROWS, NUM_COLUMNS, generator=generator).bfloat16()


def grown(make: Callable[[], object]) -> int:
    """Bytes by which the most that was resident during a call is above what was before."""

    def resident(entry: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    made = make()
    after = resident("VmHWM")
    del made
    return after - before


@pytest.mark.parametrize("options", [{}, {"quant_type": "nf4", "compress_statistics": True}, {"blocksize": 4096}])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits_are_those_of_the_whole_matrix(options, storage):
    codes, state = bnb.functional.quantize_4bit(matrix(), quant_storage=storage, **options)
    with InPieces():
        our_codes, our_state = bnb.functional.quantize_4bit(matrix(), quant_storage=storage, **options)
    assert our_codes.dtype == storage
    assert torch.equal(our_codes.view(torch.uint8), codes.view(torch.uint8))
    ours, theirs = our_state.as_dict(packed=True), state.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_eight_bits_are_those_of_the_whole_matrix():
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(matrix().half())
    with InPieces():
        our_codes, our_scales, outliers = bnb.functional.int8_vectorwise_quant(matrix().half())
    assert torch.equal(our_codes, codes)
    assert torch.equal(our_scales, scales)
    assert outliers is None


def test_outliers_are_sought_in_all_rows_at_once():
    inputs = matrix().half()
    expected = bnb.functional.int8_vectorwise_quant(inputs.clone(), threshold=5.0)
    with InPieces():
        found = bnb.functional.int8_vectorwise_quant(inputs, threshold=5.0)
    assert len(expected[2]) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_model_is_quantised_in_pieces_when_it_is_loaded(config, load, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    with Largest() as largest:
        load(quantization_config=config)
    assert largest.num_weights == 2**12


@pytest.mark.parametrize("name", ["8bit", "nf4"])
def test_the_text_encoder_of_a_pipeline_is_quantised_in_pieces_too(name, settings, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    config = PipelineQuantizationConfig(
        quant_mapping={"text_encoder": transformers.BitsAndBytesConfig(**settings[name])}
    )
    with Largest() as largest:
        SanaSprintPipeline.from_pretrained(embedded_checkpoint(), quantization_config=config, dtype=torch.bfloat16)
    assert 0 < largest.num_weights <= 2**12


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what the most was that was resident")
@pytest.mark.parametrize(
    ("quantise", "bytes_of_a_weight"),
    [(bnb.functional.quantize_4bit, 1 / 2 + 4 / 64), (bnb.functional.int8_vectorwise_quant, 1)],
)
def test_many_matrices_take_hardly_more_than_their_codes(quantise, bytes_of_a_weight):
    plain = torch.randn(2240, 2240).half()
    with InPieces():
        quantise(plain)  # whatever the first call takes for good
        most = grown(lambda: [quantise(plain) for _ in range(12)])
    # In one piece each copy of a matrix in float32 takes 20 MB, and all codes in the end several times their size.
    assert most <= 12 * plain.numel() * bytes_of_a_weight + 40 * 2**20
