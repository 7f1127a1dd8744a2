"""Folders of pictures: captions by stem or by imagefolder's tables, at every depth."""

import json

from sana_sprint.training.datasets.captions import read_captions
from sana_sprint.training.datasets.folders import folder_records
from sana_sprint.training.datasets.skipped import Skipped


def listed(folder):
    skipped = Skipped()
    return folder_records(folder, skipped), skipped.reasons


def test_a_caption_lies_beside_its_picture(tmp_path, write_files):
    write_files(
        tmp_path,
        {
            "b/cat.v2": {"JPG": b"1", "txt": "a cat\n".encode("utf-8-sig")},
            "a": {"webp": b"2", "json": b'{"prompt": "a dog"}', "txt": b"not this one"},
            "c": {"npy": b"3", "txt": b"a bird"},
            "readme": {"txt": b"about these pictures"},
            "._a": {"png": b"what some systems leave behind"},
        },
    )
    records, skipped = listed(tmp_path)
    found = {record.name: (read_captions(record).texts, record.ending) for record in records}
    assert found == {
        "a.webp": (("a dog",), "webp"),
        "b/cat.v2.JPG": (("a cat",), "jpg"),
        "c.npy": (("a bird",), "npy"),
    }
    assert list(found) == sorted(found)
    assert not skipped


def test_tables_name_their_pictures_from_their_own_folder(tmp_path, write_files):
    write_files(tmp_path, {name: {"png": b"1"} for name in ("one", "two", "deep/one", "deep/more/two", "alone")})
    (tmp_path / "alone.txt").write_text("in no table")
    rows = [{"file_name": "one.png", "text": "first"}, {"file_name": "two.png", "caption": "second"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "deep" / "metadata.csv").write_text(
        'file_name,text\none.png,"third, with a comma"\nmore/two.png,fourth\n'
    )
    records, skipped = listed(tmp_path)
    assert {record.name: read_captions(record).texts[0] for record in records} == {
        "alone.png": "in no table",
        "deep/more/two.png": "fourth",
        "deep/one.png": "third, with a comma",
        "one.png": "first",
        "two.png": "second",
    }
    assert not skipped


def test_rows_that_are_damaged_are_named_by_their_line(tmp_path, write_files):
    write_files(tmp_path, {"one": {"png": b"1"}})
    lines = ["{", '{"text": "no name"}', '{"file_name": "missing.png", "text": "x"}', "[1]"]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "one.png", "text": "a cat"}']))
    records, skipped = listed(tmp_path)
    assert [record.name for record in records] == ["one.png"]
    assert skipped.keys() == {f"metadata.jsonl:{line}" for line in range(1, 5)}
    assert "missing.png" in skipped["metadata.jsonl:3"]


def test_a_table_that_is_no_text_is_named_and_the_pictures_stand_alone(tmp_path, write_files):
    write_files(tmp_path, {"one": {"png": b"1", "txt": b"a cat"}})
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\none.png,\xff\xfe\xfa\n")
    records, skipped = listed(tmp_path)
    assert [read_captions(record).texts for record in records] == [("a cat",)]
    assert skipped.keys() == {"metadata.csv"}
