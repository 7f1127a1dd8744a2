"""Writing whole: the old file or the new, and nothing beside it."""

import pytest

from sana_sprint.files import write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial):
        partial.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_that_a_killed_process_has_left_is_written_over(tmp_path):
    (tmp_path / "file.partial").write_text("a long part")
    write_whole(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]
