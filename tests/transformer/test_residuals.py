"""Residuals of ControlNets: the block each belongs to, and sums over several ControlNets."""

import pytest
import torch

from sana_sprint.transformer.residuals import EarlyResiduals, residuals_by_block, sum_residuals


def residuals(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.full((1, 2, 3), float(value)) for value in values)


def values_of(samples) -> dict[int, float]:
    return {block: tensor.mean().item() for block, tensor in residuals_by_block(samples).items()}


def test_a_sequence_begins_after_the_second_block_and_early_residuals_after_the_first():
    assert values_of(residuals(5, 6)) == values_of(list(residuals(5, 6))) == {1: 5, 2: 6}
    assert values_of(EarlyResiduals(residuals(5, 6))) == {0: 5, 1: 6}
    assert values_of(()) == {}


@pytest.mark.parametrize(
    ("controls", "total"),
    [
        ([residuals(1, 2, 3), residuals(10, 20)], {1: 11, 2: 22, 3: 3}),
        ([EarlyResiduals(residuals(1, 2)), EarlyResiduals(residuals(10))], {0: 11, 1: 2}),
        ([residuals(1, 2, 3), EarlyResiduals(residuals(10, 20))], {0: 10, 1: 21, 2: 2, 3: 3}),
        ([residuals(4)], {1: 4}),
    ],
    ids=["after", "before", "both", "one"],
)
def test_several_controlnets_add_up_block_by_block(controls, total):
    assert values_of(sum_residuals(controls)) == total
    assert values_of(sum_residuals(reversed(controls))) == total


def test_a_sum_is_a_tuple_for_diffusers_transformer_too_unless_something_is_early():
    assert isinstance(sum_residuals([residuals(1), residuals(2, 3)]), tuple)
    assert isinstance(sum_residuals([residuals(1), EarlyResiduals(residuals(2))]), EarlyResiduals)


def test_early_residuals_cannot_be_taken_for_a_sequence():
    with pytest.raises(TypeError, match="EarlyResiduals"):
        tuple(EarlyResiduals(residuals(1)))


def test_early_residuals_are_moved_and_cast_like_a_tensor():
    moved = EarlyResiduals(residuals(1, 2)).to(device="meta", dtype=torch.bfloat16)
    assert {(sample.device.type, sample.dtype) for sample in moved.samples} == {("meta", torch.bfloat16)}
