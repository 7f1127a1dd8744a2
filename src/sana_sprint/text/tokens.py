"""An instruction and prompts to the tokens that a text encoder reads, and which of its states are kept.

B prompts, N tokens of a row, L of them kept.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase


def padded_length(length: int, lengths: Sequence[int]) -> int:
    """The first of ascending `lengths` that a text of this length fits into; the length itself beyond them all."""
    return next((enough for enough in lengths if enough >= length), length)


class Tokens(NamedTuple):
    """Rows of instruction and prompt, padded on the right. The first token is kept, and all from `start` on."""

    ids: torch.Tensor  # B N
    mask: torch.Tensor  # B N, 1 for a token and 0 for padding
    instruction: list[int]
    start: int
    cut: tuple[str | None, ...]  # of each prompt, the end that did not fit

    def select(self, columns: torch.Tensor) -> torch.Tensor:
        """(B, N, ...) to (B, L, ...): what is kept."""
        return torch.cat([columns[:, :1], columns[:, self.start :]], dim=1)

    def rows(self) -> list[list[int]]:
        """Ids without padding."""
        lengths = self.mask.sum(dim=1).tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]

    def key(self) -> Hashable:
        """What decides on the states that are kept."""
        return self.start, *map(tuple, self.rows())


def tokenize(tokenizer: PreTrainedTokenizerBase, instruction: str, prompts: list[str], max_length: int) -> Tokens:
    """Tokens of an instruction, which may be empty, and prompts directly behind it; L = `max_length`.

    Two of the instruction's tokens have a place among those that are kept, the first one and the last one. So a prompt
    of more than L - 2 tokens (without an instruction L - 1) is cut.
    """
    instruction_ids = tokenizer.encode(instruction) if instruction else []
    start = len(instruction_ids) - 1 if instruction else 1
    num_tokens = start + max_length - 1
    texts = [instruction + prompt for prompt in prompts]
    # The side is an argument, so that the caller's tokenizer keeps its own: Gemma's pads on the left by default.
    padded = tokenizer(
        texts,
        padding="max_length",
        padding_side="right",
        max_length=num_tokens,
        truncation=True,
        return_tensors="pt",
    )

    room = num_tokens - tokenizer.num_special_tokens_to_add(pair=False)
    cut: list[str | None] = []
    for text, is_full in zip(texts, padded.attention_mask.all(dim=1).tolist(), strict=True):
        # Only a text that fills its row can have been cut, and most do not: they are not tokenized again.
        excess = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[room:] if is_full else []
        cut.append(str(tokenizer.decode(excess)) if excess else None)
    return Tokens(padded.input_ids, padded.attention_mask, instruction_ids, start, tuple(cut))
