"""Captions to a text encoder: a byte-fallback BPE tokenizer and a small Gemma-2 language model, frozen afterwards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, GemmaTokenizer

from sana_sprint.text.cleaning import normalise
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION, instruction_prefix
from sana_sprint.training.loop import Draws, OptimiserSettings, train

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
INSTRUCTION_REPEATS = 200
IGNORED = -100  # a label that the cross entropy leaves out


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """The vocabulary, the network and the length of the stage."""

    vocabulary_size: int
    config: dict[str, Any]
    optimiser: OptimiserSettings
    # Share of the batches that begin with the instruction, as every prompt does when pictures are drawn.
    instruction_share: float = 0.3


def train_tokenizer(texts: list[str], vocabulary_size: int) -> GemmaTokenizer:
    """A Gemma tokenizer (BPE over "▁"-marked words, unknown characters as bytes) learned from texts."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Gemma's own tokenizer puts no border between words; here merges stay inside them, so that a word is a token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\w▁]"), behavior="isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[*SPECIAL_TOKENS, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return GemmaTokenizer(vocab=learned["vocab"], merges=merges, add_bos_token=True, padding_side="right")  # type: ignore[arg-type]


def caption_batch(
    tokenizer: GemmaTokenizer, captions: list[str], instruction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels (B, L) of captions behind an instruction, each ended by the end token."""
    texts = [instruction + normalise(caption, clean=False) + "<eos>" for caption in captions]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, IGNORED)
    return inputs.input_ids, inputs.attention_mask, labels


def train_language_model(
    captions: list[str], settings: LanguageSettings, folder: Path
) -> tuple[GemmaTokenizer, Gemma2Model]:
    """Train a tokenizer and a causal language model on captions; return the tokenizer and the headless model."""
    torch.manual_seed(settings.optimiser.seed)
    instruction = instruction_prefix(COMPLEX_HUMAN_INSTRUCTION)
    texts = [normalise(caption, clean=False) for caption in captions]
    # The instruction is one text among thousands: repeated until its words are worth a token each.
    tokenizer = train_tokenizer([*texts, *[instruction] * INSTRUCTION_REPEATS], settings.vocabulary_size)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **settings.config,
    )
    model = Gemma2ForCausalLM(config)

    def losses(draws: Draws) -> dict[str, torch.Tensor]:
        chosen = draws.numpy.integers(len(captions), size=settings.optimiser.batch_size)
        prefix = instruction if draws.numpy.random() < settings.instruction_share else ""
        ids, mask, labels = caption_batch(tokenizer, [captions[index] for index in chosen], prefix)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return {"loss": loss}

    average = train(model, losses, settings.optimiser, folder, "language model")
    return tokenizer, average.model
