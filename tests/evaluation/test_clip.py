"""CLIP scores by a tiny CLIP with random weights, against what transformers' own model says."""

import numpy as np
import pytest
import torch
from tiny_clip import LETTERS, save_tiny_clip
from transformers import CLIPModel, CLIPProcessor

from sana_sprint.evaluation.clip import ClipScorer

MOST_TOKENS = 16
CAPTIONS = ["a red circle", "two blue stars", "x", "a green cross"]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, size=(40, 40 + 10 * index, 3), dtype=np.uint8) for index in range(4)]
# Float32; cosines are sums over eight numbers, and scores are a hundred times them.
CLOSE = {"atol": 1e-3, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"), MOST_TOKENS)


@pytest.fixture(scope="module")
def scorer(folder) -> ClipScorer:
    return ClipScorer(folder)


@pytest.fixture(scope="module")
def cosines(folder) -> np.ndarray:
    """Cosines of every picture with every caption (4, 4), from the model's own logits."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(text=CAPTIONS, images=PICTURES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return (model(**inputs).logits_per_image / model.logit_scale.exp()).numpy()


def test_a_score_is_a_hundred_times_the_cosine_and_never_negative(scorer, cosines):
    assert (cosines > 0).any()
    assert (cosines < 0).any()
    for shift in range(4):  # every picture with every caption
        order = [(index + shift) % 4 for index in range(4)]
        expected = [100 * max(0.0, cosines[index, caption]) for index, caption in enumerate(order)]
        np.testing.assert_allclose(scorer(PICTURES, [CAPTIONS[index] for index in order]), expected, **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_the_mean_is_that_of_all_scores_in_batches_of_every_size(scorer, batch_size):
    expected = scorer(PICTURES, CAPTIONS).mean()
    assert expected > 0
    assert scorer.mean(iter(PICTURES), CAPTIONS, batch_size) == pytest.approx(expected, abs=1e-3)


def test_a_caption_longer_than_the_model_reads_is_cut(scorer):
    read = LETTERS[: MOST_TOKENS - 2]  # one token a letter, between start and end
    scores = scorer(PICTURES, [read] * 4)
    np.testing.assert_allclose(scorer(PICTURES, [read + "more than it reads"] * 4), scores, **CLOSE)
    assert np.abs(scorer(PICTURES, [read[1:]] * 4) - scores).max() > 1


def test_captions_must_be_one_for_each_picture(scorer):
    with pytest.raises(ValueError, match="got 4 pictures, 1 captions"):
        scorer(PICTURES, ["a"])
    with pytest.raises(ValueError, match="shorter"):
        scorer.mean(PICTURES, ["a"])
    with pytest.raises(ValueError, match="no pictures"):
        scorer.mean([], [])


def test_a_folder_of_another_model_is_refused_and_not_filled_with_random_weights(tiny_text_encoder, tmp_path):
    tiny_text_encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no CLIP"):
        ClipScorer(tmp_path)
