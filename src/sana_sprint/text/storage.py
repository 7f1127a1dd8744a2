"""Prompt embeddings and their mask to a safetensors file, and back to the arguments of a call.

B prompts, L text tokens, C width of the text encoder.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sana_sprint.files import write_whole
from sana_sprint.text.encoder import check_embeds, check_prompt, drop_padding

FORMAT_VERSION = "1"
_VERSION_KEY, _PROMPTS_KEY = "sana_sprint.prompt_embeds", "prompts"
_TENSORS = ("prompt_embeds", "prompt_attention_mask")


def save_prompt_embeds(
    path: str | os.PathLike,
    prompt_embeds: torch.Tensor,
    prompt_attention_mask: torch.Tensor,
    prompts: str | Sequence[str] | None = None,
) -> None:
    """Write what `encode_prompt` returned to a safetensors file: all of it, or nothing if that fails.

    Columns that are padding in every row are left out, for the pipelines do not look at them.

    Args:
        path: The file. What is there is replaced.
        prompt_embeds: (B, L, C).
        prompt_attention_mask: (B, L).
        prompts: The text of each row, for those who look into the file: JSON in its metadata, under "prompts".

    Raises:
        ValueError: if the tensors do not belong together, or there is not one prompt for each row.
    """
    check_embeds(prompt_embeds, prompt_attention_mask)
    metadata = {_VERSION_KEY: FORMAT_VERSION}
    if prompts is not None:
        texts = check_prompt(prompts)
        if len(texts) != len(prompt_embeds):
            raise ValueError(
                f"prompts must be one for each row of prompt_embeds, got {len(texts)} for {len(prompt_embeds)}"
            )
        metadata[_PROMPTS_KEY] = json.dumps(texts, ensure_ascii=False)
    embeds, mask = drop_padding(prompt_embeds, prompt_attention_mask)
    if mask is None:
        mask = prompt_attention_mask.new_ones(embeds.shape[:2])
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in zip(_TENSORS, (embeds, mask), strict=True)}
    content = save(tensors, metadata)
    write_whole(Path(path), lambda partial: partial.write_bytes(content))


def _metadata(content: bytes) -> dict[str, str]:
    """Of an intact safetensors file, which begins with the length of its header."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {})


def load_prompt_embeds(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """What `save_prompt_embeds` has written, as arguments of a pipeline: `pipe(**load_prompt_embeds(path))`.

    Args:
        path: The file.
        device: Of the tensors returned.

    Returns:
        "prompt_embeds" (B, K, C) and "prompt_attention_mask" (B, K) for the K <= L columns that are text in any row.

    Raises:
        ValueError: if the file is damaged, or holds something else.
        OSError: if there is no such file, or it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from None
    version = _metadata(content).get(_VERSION_KEY)
    if version != FORMAT_VERSION:
        found = "is not one of prompt embeddings" if version is None else f"is of format {version}"
        raise ValueError(f"{path} must be a file that save_prompt_embeds wrote in format {FORMAT_VERSION}, it {found}")
    if tensors.keys() != set(_TENSORS):
        raise ValueError(f"{path} must hold {' and '.join(_TENSORS)}, it holds {', '.join(tensors) or 'nothing'}")
    try:
        check_embeds(*(tensors[name] for name in _TENSORS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: tensors[name].to(device) for name in _TENSORS}
