"""The embedded model's words: what it does not know is named, together with what it does."""

import pytest

from sana_sprint.cli.words import check_words, known_words
from sana_sprint.shapes.captions import VOCABULARY


def test_the_known_words_are_all_words_of_the_vocabulary_in_groups():
    listed = known_words()
    assert listed.startswith("shapes: circle, ")
    for word in VOCABULARY:
        assert f" {word}," in listed.replace(";", ",") + ","


def test_a_caption_of_known_words_passes_in_silence(capsys):
    check_words(["a red circle left of a blue square", "Two green stars.", ""])
    assert capsys.readouterr().err == ""


def test_unknown_words_of_all_prompts_are_named_in_one_line(capsys):
    check_words(["a red dog", "a sinister red dog", "a red circle"])
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "does not know dog, sinister; it knows shapes: circle" in warning


def test_a_prompt_without_any_known_word_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no word of 'Hund und Katze'; it knows shapes: circle"):
        check_words(["a red circle", "Hund und Katze"])


def test_words_are_known_whatever_signs_stand_between_them(capsys):
    check_words(["blue/red zebra"])
    assert "does not know zebra" in capsys.readouterr().err


def test_a_prompt_of_signs_alone_has_no_word_to_complain_of(capsys):
    check_words([""])
    assert capsys.readouterr().err == ""


def test_known_words_that_make_no_scene_are_a_warning(capsys):
    check_words(["three red stars above two blue squares"])
    assert "may not follow this" in capsys.readouterr().err


def test_beside_a_drawing_colours_alone_are_enough(capsys):
    check_words(["red and blue on a white ground"], follows_drawing=True)
    assert capsys.readouterr().err == ""
    check_words(["red and blue on a white ground"])
    assert "may not follow this" in capsys.readouterr().err
