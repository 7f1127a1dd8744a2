"""Names of checkpoints, as people write them, to paths; the hub's part from its cache, as after a download."""

from pathlib import Path

import pytest

from sana_sprint.checkpoints.hub import find_source

COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "v2": "fedcba9876543210fedcba9876543210fedcba98"}
FILE = "checkpoints/model_1.6B.pth"


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache that holds two revisions of owner/name, of one file each."""
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        file = repository / "snapshots" / commit / FILE
        file.parent.mkdir(parents=True)
        file.write_text(revision)
    return tmp_path / "cache"


def test_what_is_here_comes_first(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name" / "checkpoints").mkdir(parents=True)
    (tmp_path / "owner" / "name" / FILE).write_text("here")
    assert find_source("owner/name", cache_dir=cache) == Path("owner/name")
    assert find_source(f"owner/name/{FILE}", cache_dir=cache).read_text() == "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_source("~/owner/name") == tmp_path / "owner" / "name"


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        (f"owner/name/{FILE}", "main"),
        (f"hf://owner/name/{FILE}", "main"),
        (f"https://huggingface.co/owner/name/blob/main/{FILE}", "main"),
        (f"https://huggingface.co/owner/name/resolve/v2/{FILE}", "v2"),
        (f"https://hf.co/owner/name/blob/v2/{FILE}", "v2"),
        (f"huggingface.co/owner/name/blob/main/{FILE}", "main"),
    ],
)
def test_a_file_of_the_hub_is_found_by_its_place_or_its_link(tmp_path, monkeypatch, cache, name, revision):
    monkeypatch.chdir(tmp_path)
    found = find_source(name, cache_dir=cache, local_files_only=True)
    assert found.read_text() == revision
    assert found.name == "model_1.6B.pth"


def test_a_revision_that_is_asked_for_wins(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    link = f"https://huggingface.co/owner/name/blob/main/{FILE}"
    assert find_source(link, cache_dir=cache, revision="v2", local_files_only=True).read_text() == "v2"


def test_a_repository_is_found_as_a_folder(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    assert (find_source("owner/name", cache_dir=cache, local_files_only=True) / FILE).read_text() == "main"


@pytest.mark.parametrize(
    "name", ["missing.pth", "./owner/missing.pth", "/owner/missing.pth", "../missing", "a b/c", ""]
)
def test_a_path_that_is_not_here_is_not_looked_for_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        find_source(name or str(tmp_path / "missing"))


def test_what_the_hub_does_not_give_is_one_line(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no file or folder owner/other, and the hub gave none") as caught:
        find_source("owner/other", cache_dir=cache, local_files_only=True)
    assert "\n" not in str(caught.value)
