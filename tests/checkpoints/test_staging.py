"""An output is there whole or not at all, and what was there before stays until then."""

import os
import resource
import signal
from pathlib import Path

import pytest

from sana_sprint.checkpoints.staging import staged


def fill(place: Path, text: str = "new") -> None:
    place.mkdir()
    (place / "config.json").write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def existing(tmp_path) -> Path:
    """A checkpoint's folder at the destination."""
    fill(tmp_path / "out", "old")
    return tmp_path / "out"


def fail_inside(output: Path, reason: BaseException, force: bool = False) -> None:
    """Stages a folder, and then goes wrong."""
    with staged(output, force=force) as place:
        fill(place)
        raise reason


def killed_inside(output: Path, force: bool = False) -> None:
    """Stages a folder in a process of its own, which is killed before the end."""
    child = os.fork()
    if child == 0:
        with staged(output, force=force) as place:
            fill(place)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_the_output_appears_when_it_is_complete_and_nothing_stays_beside_it(tmp_path):
    with staged(tmp_path / "a" / "b" / "out") as place:
        fill(place)
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert names_in(tmp_path / "a" / "b") == ["out"]
    assert names_in(tmp_path / "a" / "b" / "out") == ["config.json"]


def test_a_single_file_is_an_output_too(tmp_path):
    with staged(tmp_path / "model.pth") as place:
        place.write_text("weights")
    assert names_in(tmp_path) == ["model.pth"]


@pytest.mark.parametrize("reason", [ValueError(), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_leaves_neither_output_nor_folders_that_were_made_for_it(tmp_path, reason):
    with pytest.raises(type(reason)):
        fail_inside(tmp_path / "a" / "b" / "out", reason)
    assert names_in(tmp_path) == []


def test_a_full_disk_is_an_error_that_names_the_output(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught, staged(tmp_path / "out") as place:
            place.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "out")
    assert names_in(tmp_path) == []


def test_an_output_without_room_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match="would need 1000000000.00 GB, and .* GB are free"):  # noqa: SIM117
        with staged(tmp_path / "out", num_bytes=10**18):
            pytest.fail("there is no such disk")
    assert names_in(tmp_path) == []


def test_what_exists_is_not_replaced_without_force(existing, tmp_path):
    with pytest.raises(ValueError, match="exists already; --force"), staged(existing):
        pytest.fail("it exists")
    assert (existing / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


def test_force_replaces_it_once_the_new_one_is_complete(existing, tmp_path):
    with staged(existing, force=True) as place:
        fill(place)
        assert (existing / "config.json").read_text() == "old"
    assert (existing / "config.json").read_text() == "new"
    assert names_in(tmp_path) == ["out"]


def test_an_error_with_force_leaves_what_was_there(existing, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_inside(existing, KeyboardInterrupt(), force=True)
    assert (existing / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


def test_force_does_not_replace_a_folder_of_something_else(tmp_path):
    (tmp_path / "holidays").mkdir()
    (tmp_path / "holidays" / "sea.jpg").write_text("")
    with pytest.raises(ValueError, match="folder of something else"), staged(tmp_path / "holidays", force=True):
        pytest.fail("it is no checkpoint")
    assert names_in(tmp_path / "holidays") == ["sea.jpg"]


@pytest.mark.parametrize("name", ["letter.txt", "notes"])
def test_force_does_not_replace_a_file_of_something_else(tmp_path, name):
    (tmp_path / name).write_text("dear")
    with pytest.raises(ValueError, match="is no checkpoint"), staged(tmp_path / name, force=True):
        pytest.fail("it is no checkpoint")
    assert (tmp_path / name).read_text() == "dear"
    assert names_in(tmp_path) == [name]


def test_force_replaces_a_link_and_not_what_it_points_to(existing, tmp_path):
    (tmp_path / "link").symlink_to(existing)
    with staged(tmp_path / "link", force=True) as place:
        fill(place)
    assert (existing / "config.json").read_text() == "old"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "config.json").read_text() == "new"


def test_an_output_below_the_home_folder_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged(Path("~/out")) as place:
        fill(place)
    assert names_in(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_hidden_and_cleared_away_by_the_next(tmp_path):
    killed_inside(tmp_path / "out")
    assert names_in(tmp_path) == [".out.partial"]
    with staged(tmp_path / "out") as place:
        fill(place)
    assert names_in(tmp_path) == ["out"]


def test_a_killed_run_with_force_leaves_what_was_there(existing):
    killed_inside(existing, force=True)
    assert (existing / "config.json").read_text() == "old"


def test_what_a_run_killed_while_replacing_had_moved_away_comes_back(existing, tmp_path):
    killed_inside(existing, force=True)
    existing.rename(tmp_path / ".out.partial" / "replaced")  # the first of its last two moves
    with pytest.raises(ValueError, match="exists already"), staged(existing):
        pytest.fail("it exists")
    assert (existing / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


def test_two_runs_to_one_output_do_not_meet(tmp_path):
    with staged(tmp_path / "out") as place:
        fill(place)
        with pytest.raises(ValueError, match="another run is writing to .*out"), staged(tmp_path / "out"):
            pytest.fail("it is taken")
    assert names_in(tmp_path) == ["out"]
