"""Rows as people read them."""

from sana_sprint.evaluation.tables import aligned


def test_columns_are_straight_the_first_to_the_left_and_others_to_the_right():
    assert aligned([("steps", "Fréchet"), ("1", "0.5"), ("20", "12345.5")]) == [
        "steps  Fréchet",
        "1          0.5",
        "20     12345.5",
    ]
