"""What lies beside a picture to its captions, and captions with scores to the one that is read this time."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sana_sprint.training.datasets.records import Record

# The names that SANA, several captions, img2dataset and Hugging Face's imagefolder have; the first that is there.
CAPTION_FIELDS = ("prompt", "captions", "caption", "text")
SCORES_FIELD = "scores"


@dataclass(frozen=True)
class Captions:
    """Texts that describe one picture, none of them blank, each with a score above 0."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, texts: str | Sequence[str], scores: Sequence[float] | None = None) -> "Captions":
        """One text or several, with scores or all alike; blank texts are left out.

        Raises:
            ValueError: if that leaves none, or for anything but texts and a positive number for each.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a caption must be a text or a list of texts, got {texts!r}")
        scores = [1.0] * len(texts) if scores is None else scores
        if not isinstance(scores, (list, tuple)) or len(scores) != len(texts):
            raise ValueError(f"{SCORES_FIELD} must be a list with one number for each of {len(texts)} captions")
        for score in scores:
            if not isinstance(score, (int, float)) or not 0 < score < math.inf:
                raise ValueError(f"the score of a caption must be a number above 0, got {score!r}")
        pairs = [(text.strip(), float(score)) for text, score in zip(texts, scores) if text.strip()]
        if not pairs:
            raise ValueError("the caption is blank")
        return cls(tuple(text for text, _ in pairs), tuple(score for _, score in pairs))

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> "Captions | None":
        """Those of a JSON object or a row of a table, under one of `CAPTION_FIELDS`; None if it has none of them."""
        name = next((name for name in CAPTION_FIELDS if fields.get(name) is not None), None)
        return None if name is None else cls.of(fields[name], fields.get(SCORES_FIELD))


def read_captions(record: Record) -> Captions:
    """The captions of an example: from its row of a table, its .json or its .txt, whichever is first to have some.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    captions = Captions.of_fields(record.fields or {})
    if captions is None and "json" in record.files:
        content = json.loads(record.files["json"].read())
        captions = Captions.of_fields(content) if isinstance(content, dict) else Captions.of(content)
    if captions is None and "txt" in record.files:
        captions = Captions.of(record.files["txt"].read().decode("utf-8-sig"))
    if captions is None:
        raise ValueError("has no caption")
    return captions


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """How one of several captions is drawn, each time anew: with a probability in proportion to score^(1/temperature).

    Only captions with a score of at least `threshold` are drawn; where there are none, the best one is taken. That is
    SANA's rule (NVlabs/Sana, diffusion/data/datasets/sana_data.py); SANA-Sprint was trained with CLIP scores, a
    temperature of 0.1 and a threshold of 25.

    Raises:
        ValueError: for a temperature that is not above 0.
    """

    temperature: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"the temperature of captions must be above 0, got {self.temperature}")

    def choose(self, scores: Sequence[float], draw: float) -> int:
        """The place of a caption, from the scores of all and a number drawn from [0, 1)."""
        best = max(scores)
        lowest = min(self.threshold, best)
        # Relative to the best, whose power is 1 whatever the temperature.
        weights = [(score / best) ** (1 / self.temperature) if score >= lowest else 0.0 for score in scores]
        remaining = draw * sum(weights)
        for place, weight in enumerate(weights):
            remaining -= weight
            if remaining < 0:
                return place
        return scores.index(best)  # what rounding left over
