"""Options become a job: pictures and seeds, settings and what `--like` adds to them."""

import argparse
import io
from pathlib import Path

import pytest

from sana_sprint.cli.generate import add_arguments, choose_pictures, choose_request, read_prompts
from sana_sprint.cli.records import Picture, Record, Settings

STORED = Settings(
    model="some/model",
    fingerprint="",
    steps=3,
    timesteps=None,
    guidance=2.5,
    width=96,
    height=64,
    dtype="bfloat16",
    device="cpu",
    threads=1,
    version="",
    torch="",
)
SHEET = Record(
    settings=STORED,
    pictures=(Picture(prompt="a", seed=5), Picture(prompt="a", seed=6), Picture(prompt="b", seed=5)),
    is_sheet=True,
)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(arguments)


def pairs(*arguments: str, like: Record | None = None) -> list[tuple[str, int]]:
    return [(picture.prompt, picture.seed) for picture in choose_pictures(parse(*arguments), like)]


def test_a_pictures_seed_does_not_depend_on_the_other_prompts():
    assert pairs("a", "b", "--seed", "7", "--num-images", "2") == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    assert pairs("b", "--seed", "8") == [("b", 8)]


def test_prompts_of_a_file_follow_those_of_the_command_line(tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffb c\r\n\n  ü  \n".encode())
    assert read_prompts(["a"], str(tmp_path / "prompts")) == ["a", "b c", "ü"]


def test_a_hyphen_reads_prompts_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert read_prompts([], "-") == ["a", "b"]


def test_a_file_without_prompts_or_without_text_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="empty holds no prompt"):
        read_prompts([], str(tmp_path / "empty"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary is not text"):
        read_prompts([], str(tmp_path / "binary"))


def test_nothing_to_draw_is_refused_with_an_example():
    with pytest.raises(ValueError, match="give a prompt, such as"):
        pairs()


def test_an_empty_prompt_is_a_prompt():
    assert pairs("") == [("", 0)]


def test_seeds_beyond_the_largest_are_refused():
    with pytest.raises(ValueError, match="beyond the largest"):
        pairs("a", "--seed", str(2**63 - 1), "--num-images", "2")


def test_like_alone_draws_just_what_the_sheet_shows():
    assert pairs(like=SHEET) == [("a", 5), ("a", 6), ("b", 5)]


def test_prompts_and_seeds_beside_like_replace_what_it_stored():
    assert pairs("c", like=SHEET) == [("c", 5)]
    assert pairs("--seed", "9", like=SHEET) == [("a", 9), ("b", 9)]
    assert pairs("--num-images", "2", like=SHEET) == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]


def test_settings_beside_like_replace_the_stored_ones_one_by_one():
    stored = choose_request(parse(), STORED)
    assert (stored.model, stored.steps, stored.size, stored.guidance) == ("some/model", 3, (96, 64), 2.5)
    changed = choose_request(parse("--guidance", "0", "--model", "embedded"), STORED)
    assert (changed.model, changed.guidance, changed.steps, changed.dtype) == ("embedded", 0.0, 3, "bfloat16")


def test_timesteps_beside_like_replace_its_steps_and_the_other_way_round():
    by_angle = choose_request(parse("--timesteps", "1.5,1.0,0"), STORED)
    assert (by_angle.steps, by_angle.timesteps) == (None, (1.5, 1.0, 0.0))
    by_count = choose_request(parse("--steps", "4"), STORED)
    assert (by_count.steps, by_count.timesteps) == (4, None)


def test_steps_and_timesteps_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        choose_request(parse("--steps", "2", "--timesteps", "1.5,0"), None)


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("--size", "64", "'64'"),
        ("--size", "0x64", "'0x64'"),
        ("--size", "64x-1", "'64x-1'"),
        ("--steps", "0", "got 0"),
        ("--steps", "two", "'two'"),
        ("--seed", "-1", "got -1"),
        ("--seed", str(2**63), f"got {2**63}"),
        ("--num-images", "0", "got 0"),
        ("--timesteps", "1.5;0", "'1.5;0'"),
        ("--timesteps", "0,1.5", "descending angles .* got '0,1.5'"),
        ("--timesteps", "1.5,nan", "'1.5,nan'"),
        ("--timesteps", "1.5", "'1.5'"),
        ("--dtype", "int8", "'int8'"),
        ("--strength", "1.01", "from 0 to 1, got 1.01"),
        ("--strength", "-0.1", "got -0.1"),
        ("--strength", "nan", "got nan"),
        ("--strength", "half", "'half'"),
        ("--control", "lines", "'lines'"),
        ("--guidance", "nan", "finite number, got nan"),
        ("--control-scale", "inf", "finite number, got inf"),
        ("--control-scale", "nan", "finite number, got nan"),
        ("--control-scale", "much", "'much'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_named(option, value, found):
    with pytest.raises(argparse.ArgumentError, match=found):
        parse("a", f"{option}={value}")


def test_sizes_are_width_before_height():
    assert parse("--size", "96X64").size == (96, 64)


def test_like_and_output_are_paths():
    assert parse("--like", "a.png", "--output", "b").like == Path("a.png")
