"""Captions to a text encoder: a byte-fallback BPE tokenizer and a small Gemma-2 language model, frozen afterwards."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, GemmaTokenizer

from sana_sprint.shapes.captions import parse
from sana_sprint.shapes.questions import NUM_ANSWERS, answers
from sana_sprint.text.cleaning import normalise
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION, instruction_prefix
from sana_sprint.text.prefix import read_behind as read_behind_prefix
from sana_sprint.text.prefix import read_prefix
from sana_sprint.training.draws import Draws
from sana_sprint.training.loop import Objective, train
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.training.settings import LoopSettings

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
INSTRUCTION_REPEATS = 200
IGNORED = -100  # a label that the cross entropy leaves out


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """The vocabulary, the network and the length of the stage."""

    vocabulary_size: int
    config: dict[str, Any]
    loop: LoopSettings
    optimiser: OptimiserSettings
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


def tokenize_behind(
    tokenizer: GemmaTokenizer, instruction: str, captions: Sequence[str]
) -> tuple[torch.Tensor, list[list[int]]]:
    """Ids of an instruction (1, P), and those of captions as they are behind it.

    The instruction ends in a space, which becomes part of the caption's first token.
    """
    shared = tokenizer(instruction, return_tensors="pt").input_ids[:, :-1]
    texts = [instruction + normalise(caption, clean=False) for caption in captions]
    return shared, [ids[shared.shape[1] :] for ids in tokenizer(texts).input_ids]


def read_behind(
    model: Gemma2Model, instruction: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last states of an instruction (1, P) and of captions (B, L) behind it; the instruction is read once for all."""
    prefix = read_prefix(model, instruction)
    return prefix.states, read_behind_prefix(model, prefix, ids, mask)


@dataclass(frozen=True)
class CaptionBatch:
    """Captions behind an instruction, each ended by the end token, and what they ask for."""

    instruction: torch.Tensor  # 1 P
    ids: torch.Tensor  # B L
    mask: torch.Tensor  # B L
    answers: torch.Tensor  # B Q, one per question of shapes/questions.py


class ReadingModel(nn.Module):
    """A causal language model whose states must also say what they have read.

    A state has to predict the next token only, and after "a red" that is the same as after "a blue". A large model
    keeps the colour all the same, and knows what a sentence means; a tiny one trained on few words does neither. So its
    states are asked, through one matrix for each distance, for the token they stand on and for those shortly before;
    and the state of a caption's last token for the picture that the caption describes.
    """

    def __init__(self, language: Gemma2ForCausalLM, recalled_tokens: int) -> None:
        super().__init__()
        self.language = language
        width = language.config.hidden_size
        self.recall = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(recalled_tokens))
        self.answer = nn.Linear(width, sum(NUM_ANSWERS))

    def losses(self, batch: CaptionBatch) -> dict[str, torch.Tensor]:
        """Cross entropies: of the next token, of those before, and of the answers."""
        prefix, states = read_behind(self.language.model, batch.instruction, batch.ids, batch.mask)
        labels = batch.ids.masked_fill(batch.mask == 0, IGNORED)
        size = len(labels)
        # The state before a caption's first token is the instruction's last, the same for all captions.
        before = torch.cat([prefix[:, -1:].expand(size, -1, -1), states[:, :-1]], dim=1)
        next_token = _cross_entropy(
            self.language.lm_head(torch.cat([prefix[0, :-1], before.flatten(0, 1)])),
            torch.cat([batch.instruction[0, 1:], labels.flatten()]),
        )
        recall = torch.stack(
            [
                # The first `distance` tokens have nothing of the caption that far before them.
                _cross_entropy(
                    self.language.lm_head(matrix(states[:, distance:])),
                    labels[:, : labels.shape[1] - distance].where(batch.mask[:, distance:] > 0, IGNORED),
                )
                for distance, matrix in enumerate(self.recall)
            ]
        ).mean()
        last = batch.mask.sum(dim=1) - 2  # before the end token, which prompts do not have
        parts = self.answer(states[torch.arange(size), last]).split(NUM_ANSWERS, dim=-1)
        answers = torch.stack([_cross_entropy(part, answer) for part, answer in zip(parts, batch.answers.T)]).mean()
        return {
            "loss": next_token + recall + answers,
            "next_token": next_token,
            "recall": recall,
            "answers": answers,
        }


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


class LanguageObjective(Objective[ReadingModel]):
    """A reading model on captions behind an instruction."""

    def __init__(
        self, model: ReadingModel, tokenizer: GemmaTokenizer, captions: list[str], settings: OptimiserSettings
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.instruction, ids = tokenize_behind(tokenizer, instruction_prefix(COMPLEX_HUMAN_INSTRUCTION), captions)
        self.ended = [torch.tensor([*caption, tokenizer.eos_token_id]) for caption in ids]
        self.wanted = torch.tensor([answers(parse(caption)) for caption in captions])

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        chosen = draws.integers(len(self.ended)).cpu()
        padded = pad_sequence([self.ended[i] for i in chosen], True, IGNORED).to(draws.device)
        mask = (padded != IGNORED).long()
        wanted = self.wanted[chosen].to(draws.device)
        return self.model.losses(CaptionBatch(self.instruction.to(draws.device), padded * mask, mask, wanted))

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("language_model", trainable(self.model), self.settings)]

    def averaged(self) -> ReadingModel:
        return self.model


def train_language_model(
    captions: list[str], settings: LanguageSettings, folder: Path, device: torch.device
) -> tuple[GemmaTokenizer, Gemma2Model]:
    """Train a tokenizer and a causal language model on captions; return the tokenizer and the headless model."""
    torch.manual_seed(settings.loop.seed)
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
    # On a CPU the backward pass of the fused attention kernels takes ten times as long, for so few tokens.
    language = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    model = ReadingModel(language, settings.recalled_tokens)
    objective = LanguageObjective(model, tokenizer, captions, settings.optimiser)
    average = train(objective, settings.loop, folder, "language model", device)
    return tokenizer, average.language.model
