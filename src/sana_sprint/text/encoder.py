"""Prompts to Gemma-2 embeddings and an attention mask, checked, selected and repeated for the images to be drawn.

B prompts, L text tokens that are kept, C width of the text encoder.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sana_sprint.text.cache import Kept, Reading, TextCache
from sana_sprint.text.cleaning import normalise
from sana_sprint.text.instruction import instruction_prefix
from sana_sprint.text.prefix import shared_length
from sana_sprint.text.tokens import Tokens, padded_length, tokenize


class PromptEmbeddings(NamedTuple):
    """What `encode_prompts` returns.

    Attributes:
        embeds: (B, L, C).
        mask: (B, L), integers, 1 for a token and 0 for padding.
        cut: For each prompt the text at its end that was too much for L tokens, or None.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    cut: tuple[str | None, ...]


def check_prompt(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list.

    Raises:
        ValueError: if it is anything but a string or a non-empty list or tuple of strings.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, (list, tuple)) or len(prompt) == 0:
        raise ValueError(f"prompt must be a string or a non-empty list of strings, got {prompt!r}")
    for position, text in enumerate(prompt):
        if not isinstance(text, str):
            raise ValueError(f"prompt must hold strings only, got {text!r} at position {position}")
    return list(prompt)


def check_embeds(prompt_embeds: torch.Tensor, prompt_attention_mask: torch.Tensor | None) -> None:
    """Refuse embeddings and a mask that do not belong together.

    Raises:
        ValueError: unless they are (B, L, C) and (B, L) for one B and one L.
    """
    if prompt_attention_mask is None:
        raise ValueError("prompt_embeds need their prompt_attention_mask, got None")
    embeds, mask = tuple(prompt_embeds.shape), tuple(prompt_attention_mask.shape)
    if len(embeds) != 3 or mask != embeds[:2]:
        raise ValueError(
            "prompt_embeds must be (batch, length, width) and prompt_attention_mask (batch, length) with the same "
            f"batch and length, got {embeds} and {mask}"
        )


def repeat_for_images(
    prompt_embeds: torch.Tensor, prompt_attention_mask: torch.Tensor, num_images_per_prompt: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and mask for every image: all images of the first prompt, then all of the second, and so on.

    Returns:
        (B * images, L, C) and (B * images, L).

    Raises:
        ValueError: if the two do not fit each other, or for a number of images below 1.
    """
    check_embeds(prompt_embeds, prompt_attention_mask)
    if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be a whole number from 1, got {num_images_per_prompt!r}")
    repeats = int(num_images_per_prompt)
    return prompt_embeds.repeat_interleave(repeats, dim=0), prompt_attention_mask.repeat_interleave(repeats, dim=0)


def drop_padding(
    prompt_embeds: torch.Tensor, prompt_attention_mask: torch.Tensor, lengths: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same text without the columns that are padding in every row; no mask at all where none is left.

    What attends to it gives the same result: a masked token has no weight. Reads the mask on the host.

    Args:
        prompt_embeds, prompt_attention_mask: (B, L, C) and (B, L).
        lengths: Ascending. What is left is padded to the first of these that it fits into, and keeps its mask: compiled
            networks then meet few shapes.

    Returns:
        (B, K, C) and (B, K) for the columns that any row uses, K of them before they are padded; without `lengths` None
        for a mask of ones.
    """
    is_text = prompt_attention_mask.to("cpu") > 0
    used = is_text.any(dim=0)
    if not used.any():
        return prompt_embeds, prompt_attention_mask  # nothing to attend to: the network's own affair
    if not used.all():
        columns = used.nonzero().flatten().to(prompt_embeds.device)
        prompt_embeds, prompt_attention_mask = prompt_embeds[:, columns], prompt_attention_mask[:, columns]
    if lengths:
        missing = padded_length(prompt_embeds.shape[1], lengths) - prompt_embeds.shape[1]
        return F.pad(prompt_embeds, (0, 0, 0, missing)), F.pad(prompt_attention_mask, (0, missing))
    return prompt_embeds, None if is_text[:, used].all() else prompt_attention_mask


def _read_whole(text_encoder: PreTrainedModel, tokens: Tokens, device: torch.device) -> torch.Tensor:
    """Last states (B, L, C) of the tokens that are kept; every token is read, padding too."""
    # Nothing is generated, so no keys and values are needed.
    states = text_encoder(tokens.ids.to(device), attention_mask=tokens.mask.to(device), use_cache=False)[0]
    return tokens.select(states.to(device))


def _read_new(
    text_encoder: PreTrainedModel, tokens: Tokens, device: torch.device, kept: Kept, reading: Reading
) -> torch.Tensor:
    """The same (B, K, C) for the first K <= L columns, of which the others are padding in every row; zero for padding.

    Read is only what an instruction that is kept does not begin with.
    """
    rows = tokens.rows()
    shared, longest = shared_length(tokens.instruction, rows), max(map(len, rows))
    if shared:
        longest = shared + padded_length(longest - shared, reading.lengths)  # or to where the row ends
    ids, mask = tokens.ids[:, shared:longest].to(device), tokens.mask[:, shared:longest].to(device)
    if shared:
        prefix = kept.prefix(text_encoder, tokens.ids[:1, :shared].to(device))
        states = reading.read_behind(text_encoder, prefix, ids, mask).to(device)
        first = prefix.states[:, :1].to(device).expand(len(ids), -1, -1)
    else:
        states = text_encoder(ids, attention_mask=mask, use_cache=False)[0].to(device)
        first = states[:, :1]
    states = states.masked_fill(mask[:, :, None] == 0, 0)
    return torch.cat([first, states[:, tokens.start - shared :]], dim=1)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    prompts: str | Sequence[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    max_sequence_length: int = 300,
    instruction: Sequence[str] | None = None,
    clean_caption: bool = False,
    cache: TextCache | None = None,
) -> PromptEmbeddings:
    """The last hidden state of the text encoder for each prompt, with an instruction read before it.

    The prompt, in lower case, directly follows the instruction. Of the tokens of both, the start-of-text token and the
    last L - 1 are kept: the instruction colours the embeddings of the prompt without taking its place in them, but for
    its last token. A prompt of more than L - 2 tokens (without an instruction L - 1) is cut.

    Args:
        tokenizer: Gemma's; left as it is.
        text_encoder: Gemma-2 without its language head.
        prompts: One or several.
        device: Where the text encoder computes; the result stays there.
        dtype: Of the embeddings returned.
        max_sequence_length: L, the number of tokens kept.
        instruction: Lines before the prompt, such as `instruction.COMPLEX_HUMAN_INSTRUCTION`; None for none.
        clean_caption: Whether to remove what captions from the web are full of: `cleaning.clean_caption`.
        cache: What was read before, to be read no more. The embeddings are the same up to float rounding, and zero
            where the mask is. None reads everything, in rows padded to the full length, as diffusers does.

    Raises:
        ValueError: for prompts or an instruction that are no strings, or a length below 1.
        ImportError: if `clean_caption` needs a package that is not installed.
    """
    if max_sequence_length < 1:
        raise ValueError(f"max_sequence_length must be at least 1, got {max_sequence_length}")
    device = torch.device(device)
    texts = [normalise(text, clean_caption) for text in check_prompt(prompts)]
    tokens = tokenize(tokenizer, instruction_prefix(instruction), texts, max_sequence_length)
    mask = tokens.select(tokens.mask).to(device)
    kept = None if cache is None else cache.kept(text_encoder, device)
    if cache is None or kept is None:
        embeds = _read_whole(text_encoder, tokens, device).to(dtype)
    else:
        reading = cache.reading
        states = kept.prompts.get(tokens.key(), lambda: _read_new(text_encoder, tokens, device, kept, reading))
        # Never the tensor that is kept: callers may edit theirs.
        embeds = torch.zeros(*mask.shape, states.shape[-1], device=device, dtype=dtype)
        embeds[:, : states.shape[1]] = states
    return PromptEmbeddings(embeds, mask, tokens.cut)
