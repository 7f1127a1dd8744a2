"""Captions: every form in which they come, and the draw among several."""

import numpy as np
import pytest

from sana_sprint.training.datasets.captions import CaptionChoice, Captions, read_captions
from sana_sprint.training.datasets.records import Record, Span


@pytest.fixture
def record(tmp_path):
    """Makes the record of an example with these files."""

    def make(fields=None, **contents: bytes) -> Record:
        for ending, content in contents.items():
            (tmp_path / f"a.{ending}").write_bytes(content)
        return Record("a", {ending: Span.whole(tmp_path / f"a.{ending}") for ending in contents}, fields)

    return make


@pytest.mark.parametrize(
    ("files", "texts", "scores"),
    [
        ({"txt": b"  a cat\n"}, ["a cat"], [1]),
        ({"json": b'{"prompt": "a cat", "width": 64}'}, ["a cat"], [1]),
        ({"json": b'{"caption": "a cat", "text": "not this"}'}, ["a cat"], [1]),
        ({"json": b'{"width": 64}', "txt": b"a cat"}, ["a cat"], [1]),
        ({"json": b'["a cat", "a dog"]'}, ["a cat", "a dog"], [1, 1]),
        ({"json": b'{"captions": ["a cat", " ", "a dog"], "scores": [30, 20, 25.5]}'}, ["a cat", "a dog"], [30, 25.5]),
        ({"fields": {"text": "a cat"}, "txt": b"not this"}, ["a cat"], [1]),
    ],
)
def test_captions_are_found_in_every_form(files, texts, scores, record):
    found = read_captions(record(**files))
    assert (list(found.texts), list(found.scores)) == (texts, scores)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no caption"),
        ({"json": b"{}"}, "no caption"),
        ({"json": b"{"}, "Expecting"),
        ({"json": b"7"}, "got 7"),
        ({"json": b'{"prompt": {"a": 1}}'}, "a text or a list of texts"),
        ({"txt": b" \n"}, "blank"),
        ({"txt": b"\xff\xfe\xfa"}, "utf-8"),
        ({"json": b'{"captions": ["a", "b"], "scores": [1]}'}, "one number for each of 2"),
        ({"json": b'{"captions": ["a"], "scores": [0]}'}, "above 0, got 0"),
        ({"json": b'{"captions": ["a"], "scores": [NaN]}'}, "above 0, got nan"),
        ({"json": b'{"captions": ["a"], "scores": ["high"]}'}, "got 'high'"),
    ],
)
def test_what_is_no_caption_says_why(files, named, record):
    with pytest.raises(ValueError, match=named):
        read_captions(record(**files))


def test_a_caption_is_drawn_in_proportion_to_its_score_to_the_power_of_one_over_the_temperature():
    choice = CaptionChoice(temperature=0.5)
    # Squares: 9, 1 and 6 of 16.
    scores = [3.0, 1.0, 6**0.5]
    assert [choice.choose(scores, draw) for draw in (0, 8.9 / 16, 9.1 / 16, 9.9 / 16, 10.1 / 16, 0.999)] == [
        *(0, 0),
        *(1, 1),
        *(2, 2),
    ]


@pytest.mark.parametrize("temperature", [1e-9, 0.1, 1.0, 1e9])
def test_every_temperature_draws_something_and_a_low_one_the_best(temperature):
    choice = CaptionChoice(temperature=temperature)
    drawn = [choice.choose([24.0, 30.0, 25.0], draw) for draw in np.linspace(0, np.nextafter(1, 0), 99)]
    assert set(drawn) == ({1} if temperature < 0.01 else {0, 1, 2})
    assert drawn.count(1) == max(map(drawn.count, range(3)))


def test_a_caption_below_the_threshold_is_not_drawn_unless_all_are_and_then_the_best_is():
    draws = np.linspace(0, np.nextafter(1, 0), 50)
    choice = CaptionChoice(threshold=25)
    assert {choice.choose([24.0, 26.0, 25.0], draw) for draw in draws} == {1, 2}
    assert {choice.choose([24.0, 20.0, 19.0], draw) for draw in draws} == {0}


def test_captions_without_scores_are_equally_likely():
    captions = Captions.of(["a", "b", "c", "d"])
    drawn = [CaptionChoice().choose(captions.scores, draw) for draw in (np.arange(400) + 0.5) / 400]
    assert np.bincount(drawn).tolist() == [100] * 4


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0, got 0"):
        CaptionChoice(temperature=0)
