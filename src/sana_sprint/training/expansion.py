"""A transformer to a deeper one that predicts the same: block expansion (Wu et al., arXiv 2401.02415).

A new block is a copy of the one behind it, whose projections back to the tokens are zero: it adds nothing until it has
learned something.
"""

import copy

from torch import nn

from sana_sprint.transformer.model import SanaTransformer2DModel

# What a block adds to the tokens ends with these.
_WAYS_OUT = ("attn1.to_out.", "attn2.to_out.", "ff.conv_point.")


def expanded(transformer: SanaTransformer2DModel, num_layers: int) -> SanaTransformer2DModel:
    """A copy with `num_layers` blocks, new ones in the middle; a plain copy if it has as many already.

    Args:
        transformer: of two blocks or more.
        num_layers: how many it shall have at least.

    Raises:
        ValueError: for a transformer of one block, which has no middle.
    """
    if len(transformer.transformer_blocks) < 2:
        raise ValueError("a transformer to deepen must have two blocks or more, got 1")
    deeper = copy.deepcopy(transformer)
    blocks = deeper.transformer_blocks
    while len(blocks) < num_layers:
        middle = (len(blocks) + 1) // 2
        new = copy.deepcopy(blocks[middle])
        for name, parameter in new.named_parameters():
            if name.startswith(_WAYS_OUT):
                nn.init.zeros_(parameter)
        blocks.insert(middle, new)
    deeper.register_to_config(num_layers=len(blocks))
    return deeper
