"""Tokens that many texts begin with, read once by a text encoder, and the texts behind them.

B texts, P tokens that all begin with, K tokens behind them, C width of the text encoder.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel


class Prefix(NamedTuple):
    """What reading a prefix leaves behind."""

    states: torch.Tensor  # 1 P C, the last ones
    keys_and_values: DynamicCache  # of one text


# Text encoder, prefix, tokens and mask (B, K) to the last states (B, K, C): `read_behind`.
Reader = Callable[[PreTrainedModel, Prefix, torch.Tensor, torch.Tensor], torch.Tensor]


class _BehindPrefix(Cache):
    """A prefix's keys and values as any number of texts see them. Nothing is added to them, so they serve again."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prefix: Any = self.layers[layer_idx]
        keys, values = (
            # Those of an offloaded encoder lie elsewhere than it computes.
            torch.cat([before.to(behind.device).expand(len(behind), -1, -1, -1), behind], dim=-2)
            for before, behind in ((prefix.keys, key_states), (prefix.values, value_states))
        )
        return keys, values


def shared_length(prefix: list[int], rows: Sequence[list[int]]) -> int:
    """How many tokens of a prefix all rows begin with, counting neither its last one nor the last of any row.

    The last token of a prefix is the one that the text behind it may be joined to: a space becomes part of a word. And
    every row keeps a token to be read.
    """
    # What the first and the last row in lexicographic order have in common, all rows have.
    columns = zip(prefix[:-1], min(rows), max(rows), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return min(shared, min(map(len, rows)) - 1)


def read_prefix(text_encoder: PreTrainedModel, ids: torch.Tensor) -> Prefix:
    """Read tokens (1, P)."""
    read = text_encoder(ids, use_cache=True)
    return Prefix(read.last_hidden_state, read.past_key_values)


def read_behind(text_encoder: PreTrainedModel, prefix: Prefix, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last states (B, K, C) of texts, tokens and mask (B, K), as they are behind a prefix.

    Equal to those of the whole texts: a causal encoder reads a prefix in the same way whatever follows.
    """
    whole_mask = torch.cat([mask.new_ones(len(ids), prefix.states.shape[1]), mask], dim=1)
    behind = _BehindPrefix(layers=prefix.keys_and_values.layers)
    return text_encoder(ids, attention_mask=whole_mask, past_key_values=behind).last_hidden_state
