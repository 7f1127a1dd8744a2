"""Blocks that begin as nothing: the same predictions, and gradients that can change them."""

import diffusers
import pytest
import torch
from tiny_training import tiny_data, tiny_teacher

from sana_sprint.training.draws import Draws
from sana_sprint.training.expansion import expanded
from sana_sprint.training.flow import predict_velocity
from sana_sprint.transformer.model import SanaTransformer2DModel


def velocity(transformer: SanaTransformer2DModel) -> torch.Tensor:
    batch = tiny_data().batch(Draws.of_step(0, 0, 4))
    time = torch.tensor([0.1, 0.4, 0.7, 1.0])
    return predict_velocity(transformer, batch.clean, time, batch.caption, batch.mask, torch.full((4,), 4.5))


def test_a_deeper_transformer_predicts_the_same(tmp_path):
    shallow = tiny_teacher().eval()
    before = len(shallow.transformer_blocks)
    deeper = expanded(shallow, before + 2)
    assert len(deeper.transformer_blocks) == deeper.config.num_layers == before + 2
    assert len(shallow.transformer_blocks) == shallow.config.num_layers == before
    with torch.no_grad():
        assert torch.equal(velocity(deeper), velocity(shallow))
    deeper.save_pretrained(tmp_path)
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path)
    assert theirs.config.num_layers == before + 2
    assert all(torch.equal(deeper.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_a_new_block_learns_beside_the_one_it_was_copied_from():
    shallow = tiny_teacher()
    middle = (len(shallow.transformer_blocks) + 1) // 2
    deeper = expanded(shallow, len(shallow.transformer_blocks) + 1).requires_grad_(True)
    velocity(deeper).square().mean().backward()
    new, copied = deeper.transformer_blocks[middle : middle + 2]
    for out in (new.attn1.to_out[0], new.attn2.to_out[0], new.ff.conv_point):
        assert not out.weight.any()
        assert out.weight.grad.any()
    assert torch.equal(new.attn1.to_q.weight, copied.attn1.to_q.weight)
    assert new.attn1.to_q.weight.data_ptr() != copied.attn1.to_q.weight.data_ptr()


def test_a_new_block_stands_in_the_middle_before_the_one_it_was_copied_from():
    shallow = tiny_teacher(num_layers=5)
    blocks = expanded(shallow, 6).transformer_blocks
    for index, block in zip((0, 1, 2, 4, 5), shallow.transformer_blocks, strict=True):
        kept = blocks[index].state_dict()
        assert all(torch.equal(kept[name], value) for name, value in block.state_dict().items())
    assert torch.equal(blocks[3].attn2.to_k.weight, blocks[4].attn2.to_k.weight)
    assert not blocks[3].ff.conv_point.weight.any()


def test_one_block_has_no_middle():
    with pytest.raises(ValueError, match="two blocks or more, got 1"):
        expanded(tiny_teacher(num_layers=1), 2)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_transformer_that_is_deep_enough_stays_as_it_is(num_layers):
    shallow = tiny_teacher()
    same = expanded(shallow, num_layers)
    assert same is not shallow
    assert same.config == shallow.config
    assert all(torch.equal(shallow.state_dict()[name], value) for name, value in same.state_dict().items())
