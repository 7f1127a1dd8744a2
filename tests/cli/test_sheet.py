"""Sheets show every picture, its pixels unchanged but for a whole factor, with its caption beneath."""

import numpy as np
import pytest
from PIL import Image

from sana_sprint.cli.sheet import draw_sheet, wrap

COLOURS = [(200, 10 * index, 0) for index in range(5)]


def tiles(size):
    return [Image.new("RGB", size, colour) for colour in COLOURS]


@pytest.mark.parametrize(("size", "factor"), [((64, 32), 4), ((100, 50), 3), ((300, 200), 1)])
def test_every_picture_is_on_the_sheet_enlarged_by_a_whole_factor(size, factor):
    sheet = np.asarray(draw_sheet(tiles(size), ["caption"] * 5))
    for colour in COLOURS:
        assert (sheet == colour).all(axis=-1).sum() == size[0] * size[1] * factor**2


def test_pictures_stand_in_reading_order_and_captions_beneath_them():
    sheet = np.asarray(draw_sheet(tiles((256, 256)), ["one", "two", "three", "four", ""]))
    corners = []
    for index, colour in enumerate(COLOURS):
        rows, columns = np.nonzero((sheet == colour).all(axis=-1))
        corners.append((rows.min(), columns.min()))
        ink = (sheet[rows.max() + 1 : rows.max() + 30, columns.min() : columns.max() + 1] < 128).any()
        assert ink == (index < 4)  # the last caption is empty
    assert corners == sorted(corners)
    assert len({row for row, _ in corners}) == 2


def test_a_caption_is_wrapped_at_spaces_within_its_width():
    assert wrap("a red circle left of a blue square", 12, len) == ["a red circle", "left of a", "blue square"]


def test_a_word_wider_than_its_picture_is_cut_and_nothing_is_lost():
    lines = wrap("ab abcdefghijklmnop cd", 5, len)
    assert max(map(len, lines)) <= 5
    assert "".join(lines).replace(" ", "") == "ababcdefghijklmnopcd"


def test_captions_must_be_as_many_as_pictures():
    with pytest.raises(ValueError, match="got 5 and 1"):
        draw_sheet(tiles((8, 8)), ["one"])


def test_a_sheet_has_as_many_columns_as_are_asked_for():
    images = [Image.new("RGB", (256, 256)) for _ in range(6)]
    one_row, square = draw_sheet(images, ["a"] * 6, columns=6), draw_sheet(images, ["a"] * 6)
    assert one_row.width == 2 * square.width - 15  # the margin at the end
    assert 2 * one_row.height == square.height + 15
