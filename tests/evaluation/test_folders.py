"""Folders of pictures and files of captions: what is read, in which order, and what is refused by name."""

import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from sana_sprint.evaluation.folders import PictureFolder, check_one_size, read_captions


def save(path, width: int, height: int, colour=(10, 20, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).convert(mode).save(path)


def test_pictures_of_subfolders_are_read_too_in_the_order_of_their_names_and_other_files_are_left(tmp_path):
    save(tmp_path / "b.PNG", 4, 6, (255, 0, 0))
    save(tmp_path / "a" / "z.webp", 4, 6, (0, 255, 0))
    save(tmp_path / "c.jpg", 4, 6, (90, 90, 90), mode="L")
    (tmp_path / "notes.txt").write_text("no picture")
    folder = PictureFolder(tmp_path)
    assert [path.name for path in folder.paths] == ["z.webp", "b.PNG", "c.jpg"]
    pictures = list(folder)
    assert len(pictures) == len(folder) == 3
    assert {picture.shape for picture in pictures} == {(6, 4, 3)}
    assert {picture.dtype for picture in pictures} == {np.dtype(np.uint8)}
    assert pictures[1][0, 0].tolist() == [255, 0, 0]
    assert pictures[2][0, 0].tolist() == [90, 90, 90]


@pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24), (8, 8), (2, 4)])
def test_a_size_makes_the_shorter_side_that_long_and_cuts_the_longer_on_both_ends(width, height, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    (picture,) = PictureFolder(tmp_path, size=4)
    scale = 4 / min(width, height)
    resized = np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - 4) // 2, (resized.shape[1] - 4) // 2
    assert np.abs(picture.astype(int) - resized[top : top + 4, left : left + 4]).max() <= 1  # rounded once or twice


def test_pictures_of_two_sizes_are_named_before_any_is_read_unless_they_are_cut(tmp_path):
    save(tmp_path / "ours" / "a.png", 8, 8)
    save(tmp_path / "theirs" / "b.png", 8, 16)
    ours, theirs = PictureFolder(tmp_path / "ours"), PictureFolder(tmp_path / "theirs")
    check_one_size(ours)
    with pytest.raises(ValueError, match=r"a\.png has 8x8 pixels and .*b\.png 8x16"):
        check_one_size(ours, theirs)
    check_one_size(PictureFolder(tmp_path / "ours", 4), PictureFolder(tmp_path / "theirs", 4))


def test_pictures_are_upright_and_on_white_where_they_are_transparent(tmp_path):
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 4), (200, 0, 0)).save(tmp_path / "a.jpg", exif=sideways)
    Image.new("RGBA", (4, 8), (200, 0, 0, 0)).save(tmp_path / "b.png")
    folder = PictureFolder(tmp_path)
    check_one_size(folder)
    turned, transparent = folder
    assert turned.shape == transparent.shape == (8, 4, 3)
    assert (transparent == 255).all()


def test_folders_without_pictures_and_broken_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*missing"):
        PictureFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no pictures"):
        PictureFolder(tmp_path)
    save(tmp_path / "whole.png", 40, 40)
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        list(PictureFolder(tmp_path))
    (tmp_path / "broken.png").unlink()
    with pytest.raises(ValueError, match=r"text\.png cannot be read"):
        check_one_size(PictureFolder(tmp_path))


@pytest.mark.parametrize("entries", [{"a": "one", "b": "two"}, {"a": {"prompt": "one"}, "b": "two"}])
def test_captions_are_read_plain_and_in_the_layout_of_mjhq(entries, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(entries))
    assert read_captions(path) == {"a": "one", "b": "two"}


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}', '{"a": {"caption": "one"}}'])
def test_captions_in_another_layout_are_refused_with_the_layouts_that_are_read(text, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r'captions\.json must be JSON such as \{"name": "caption"\}'):
        read_captions(path)
