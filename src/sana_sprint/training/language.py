"""Captions to a text encoder: a byte-fallback BPE tokenizer and a small Gemma-2 language model, frozen afterwards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
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
    instruction_share: float = 0.2
    # How many tokens, from its own backwards, a state must be able to name.
    recalled_tokens: int = 4


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


class RecallingModel(nn.Module):
    """A causal language model whose states must also name the tokens before them.

    A state has to predict the next token only, and after "a red" that is the same as after "a blue". A large model
    keeps the colour all the same; a tiny one trained on few words forgets it. So its last states are asked, through one
    matrix for each distance, for the token they stand on and for those shortly before.
    """

    def __init__(self, language: Gemma2ForCausalLM, recalled_tokens: int) -> None:
        super().__init__()
        self.language = language
        width = language.config.hidden_size
        self.recall = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(recalled_tokens))

    def losses(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross entropies of ids (B, L) whose labels (B, L) leave out padding."""
        states = self.language.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        next_token = _cross_entropy(self.language.lm_head(states[:, :-1]), labels[:, 1:])
        recall = torch.stack(
            [
                # A position is left out if it is padding, and the first `distance` have nothing that far before them.
                _cross_entropy(
                    self.language.lm_head(matrix(states[:, distance:])),
                    ids[:, : ids.shape[1] - distance].where(mask[:, distance:] > 0, IGNORED),
                )
                for distance, matrix in enumerate(self.recall)
            ]
        ).mean()
        return {"loss": next_token + recall, "next_token": next_token, "recall": recall}


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def train_language_model(
    captions: list[str], settings: LanguageSettings, folder: Path, device: torch.device
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
    model = RecallingModel(Gemma2ForCausalLM(config), settings.recalled_tokens).to(device)

    def losses(draws: Draws) -> dict[str, torch.Tensor]:
        chosen = draws.rng.integers(len(captions), size=settings.optimiser.batch_size)
        prefix = instruction if draws.rng.random() < settings.instruction_share else ""
        batch = caption_batch(tokenizer, [captions[index] for index in chosen], prefix)
        return model.losses(*(part.to(device) for part in batch))

    average = train(model, losses, settings.optimiser, folder, "language model")
    return tokenizer, average.language.model
