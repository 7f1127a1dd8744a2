"""Names of pictures, and files that are written whole or not at all."""

import errno

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_sprint.cli.files import picture_name, prepare_output, save_new, slug

RED = Image.new("RGB", (4, 4), "red")
BLUE = Image.new("RGB", (4, 4), "blue")


class Unwritable:
    """An image whose writing stops midway, as on a full disk or at Ctrl-C."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save(self, stream, **_ignored) -> None:
        stream.write(b"\x89PNG half a picture")
        raise self.error


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle!", "a-red-circle"),
        ("  two\nlines ", "two-lines"),
        ("ein grüner Stern", "ein-grüner-stern"),
        ("红色圆圈", "红色圆圈"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "empty"),
        ("?!", "empty"),
    ],
)
def test_a_slug_holds_the_prompts_words_and_nothing_a_shell_or_path_would_read(prompt, expected):
    assert slug(prompt) == expected


@pytest.mark.parametrize("prompt", ["word " * 100, "红" * 300, "ü" * 300])
def test_a_long_prompt_makes_a_name_that_file_systems_allow(prompt, tmp_path):
    name = picture_name(prompt, 2**63 - 1)
    assert len(name.encode()) <= 200
    assert save_new(RED, tmp_path / name, PngInfo()).exists()


def test_a_taken_name_gets_a_number_and_the_older_file_stays(tmp_path):
    first = save_new(RED, tmp_path / "a.png", PngInfo())
    second = save_new(BLUE, tmp_path / "a.png", PngInfo())
    third = save_new(BLUE, tmp_path / "a.png", PngInfo())
    assert [path.name for path in (first, second, third)] == ["a.png", "a-2.png", "a-3.png"]
    assert Image.open(first).getpixel((0, 0)) == (255, 0, 0)
    assert Image.open(third).getpixel((0, 0)) == (0, 0, 255)


def test_a_dangling_link_counts_as_taken(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert save_new(RED, tmp_path / "a.png", PngInfo()).name == "a-2.png"
    assert not (tmp_path / "nowhere.png").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)):
        save_new(Unwritable(error), tmp_path / "a.png", PngInfo())
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_as_readable_for_others_as_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    saved = save_new(RED, tmp_path / "a.png", PngInfo())
    assert saved.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_output_is_a_folder_made_if_missing_or_a_png_file(tmp_path):
    assert prepare_output(tmp_path / "new" / "deep") == (tmp_path / "new" / "deep", None)
    assert (tmp_path / "new" / "deep").is_dir()
    assert prepare_output(tmp_path / "other" / "one.PNG") == (tmp_path / "other", "one.PNG")
    assert (tmp_path / "other").is_dir()
    folder_of_that_name = tmp_path / "odd.png"
    folder_of_that_name.mkdir()
    assert prepare_output(folder_of_that_name) == (folder_of_that_name, None)


def test_output_of_another_format_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.png, got .*one\.jpg"):
        prepare_output(tmp_path / "one.jpg")


def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / "file" / "one.png"):
        with pytest.raises(ValueError, match="is a file"):
            prepare_output(output)
