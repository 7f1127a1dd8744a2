"""Tar shards: read in any order, written so that webdataset reads them, damage noticed and survived."""

import gzip

import pytest
import webdataset

from sana_sprint.training.datasets.shards import shard_records, write_shard
from sana_sprint.training.datasets.skipped import Skipped

EXAMPLES = {f"folder/{number}": {"png": bytes([number]) * 700, "json": b"{}"} for number in range(6)}


def listed(path):
    skipped = Skipped()
    return shard_records(path, "a.tar", skipped), skipped.reasons


def test_a_shard_that_webdataset_wrote_is_listed_in_its_order_and_read_in_any(tmp_path, write_tar):
    records, skipped = listed(write_tar(tmp_path / "a.tar", EXAMPLES))
    assert [record.name for record in records] == [f"a.tar:{key}" for key in EXAMPLES]
    for record, files in reversed(list(zip(records, EXAMPLES.values(), strict=True))):
        assert {ending: span.read() for ending, span in record.files.items()} == files
    assert not skipped


def test_a_key_ends_at_the_first_dot_and_an_ending_is_in_lower_case(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", {"v1.5/key": {"text0.npy": b"1", "PNG": b"2"}})
    (record,), _ = listed(path)
    assert (record.name, set(record.files)) == ("a.tar:v1.5/key", {"text0.npy", "png"})


def test_webdataset_reads_what_is_written(tmp_path):
    write_shard(tmp_path / "a.tar", EXAMPLES.items())
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)}
    assert found.keys() == EXAMPLES.keys()
    assert all(found[key][ending] == content for key in EXAMPLES for ending, content in EXAMPLES[key].items())


def test_the_same_examples_are_the_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, EXAMPLES.items())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_without_examples_is_whole(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    assert listed(tmp_path / "a.tar") == ([], {})


# A member is a header of 512 bytes and content in blocks of 512: an example here takes 1024 and 1536.
@pytest.mark.parametrize("size", [2560 * 3, 2560 * 3 + 100, 2560 * 3 + 1024 + 512 + 100])
def test_a_shard_that_is_cut_off_gives_what_comes_before_and_is_named(size, tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", EXAMPLES)
    path.write_bytes(path.read_bytes()[:size])
    records, skipped = listed(path)
    assert [record.name for record in records][:3] == [f"a.tar:{key}" for key in list(EXAMPLES)[:3]]
    assert len(records) <= 4
    assert skipped.keys() == {"a.tar"}


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", EXAMPLES)
    content = bytearray(path.read_bytes())
    content[2560 * 2 : 2560 * 2 + 300] = b"x" * 300
    path.write_bytes(content)
    records, skipped = listed(path)
    assert [record.name for record in records] == ["a.tar:folder/0", "a.tar:folder/1"]
    assert skipped == {"a.tar": "damaged or cut off after 5120 bytes; what stands before that is read"}


@pytest.mark.parametrize("content", [b"no archive at all", b"", gzip.compress(b"an archive", mtime=0)])
def test_what_is_no_shard_is_named(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    records, skipped = listed(tmp_path / "a.tar")
    assert records == []
    assert skipped["a.tar"].startswith("no intact tar file")
