"""Pictures with captions as a dataset: from shards and folders alike, in buckets, whatever is damaged left out."""

import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from sana_sprint.training.datasets.image_text import ImageTextDataset

SHAPES = [(48, 96, 3), (64, 64, 3), (96, 48, 3)]  # of the examples, in turn


def with_damage(examples, picture, array):
    """Three good examples, and every kind of damage, by key."""
    good = examples(3)
    caption = {"txt": b"a cat"}
    whole = picture(64, 64)
    return good, {
        "junk": {"png": b"no picture", **caption},
        "empty": {"jpg": b"", **caption},
        "cut png": {"png": whole[: len(whole) // 2], **caption},
        "cut jpeg": {"jpg": picture(64, 64, format="JPEG")[:900], **caption},
        "no caption": {"png": whole},
        "broken caption": {"png": whole, "json": b'{"prompt": '},
        "blank caption": {"png": whole, "txt": b"  "},
        "no array": {"npy": b"no array", **caption},
        "cut array": {"npy": array(np.zeros((4, 8, 8), np.float16))[:300], **caption},
        "flat": {"npy": array(np.zeros((8, 8), np.float16)), **caption},
        "whole numbers": {"npy": array(np.zeros((4, 8, 8), np.int64)), **caption},
        "objects": {"npy": array(np.array([None])), **caption},
        "not finite": {"npy": array(np.full((4, 8, 8), np.inf, np.float32)), **caption},
    }


@pytest.fixture(params=["shard", "shards", "folder"])
def make_source(request, tmp_path, write_tar, write_files):
    """Writes examples in each of the forms of a source, and returns it."""

    def make(examples):
        if request.param == "folder":
            return write_files(tmp_path / "pictures", examples)
        if request.param == "shard":
            return write_tar(tmp_path / "all.tar", examples)
        for number in range(2):
            of_shard = dict(list(examples.items())[number::2])
            write_tar(tmp_path / "shards" / str(number) / "some.tar", of_shard)
        return tmp_path / "shards"

    return make


def test_every_form_holds_the_same_examples(make_source, examples, bins):
    dataset = ImageTextDataset(make_source(examples(7)), bins)
    found = {dataset[index].captions.texts[0]: dataset[index].content.shape for index in range(len(dataset))}
    assert found == {f"a red circle {number}": SHAPES[number % 3] for number in range(7)}
    assert not dataset.skipped


def test_all_that_is_damaged_is_skipped_and_named_and_the_next_good_one_takes_its_place(
    make_source, examples, picture, array, bins
):
    good, damaged = with_damage(examples, picture, array)
    dataset = ImageTextDataset(make_source({**damaged, **good}), bins)
    read = [dataset[index] for index in range(len(dataset))]
    assert len(read) == len(good) + len(damaged)
    assert {example.captions.texts[0] for example in read} == {f"a red circle {number}" for number in range(3)}
    assert len(dataset.skipped) == len(damaged)
    for key in damaged:
        (reason,) = [reason for name, reason in dataset.skipped.reasons.items() if key in name]
        assert len(reason) > 5
        assert " at 0x" not in reason  # the same damage has the same reason every time


def test_batches_hold_one_shape_and_nothing_that_is_damaged(make_source, examples, picture, array, bins, place):
    _, damaged = with_damage(examples, picture, array)
    dataset = ImageTextDataset(make_source({**damaged, **examples(12)}), bins)
    seen = set()
    for step in range(40):
        batch = dataset.batch(place(step))
        assert len({example.content.shape for example in batch}) == 1
        seen |= {example.captions.texts[0] for example in batch}
    assert seen == {f"a red circle {number}" for number in range(12)}
    assert len(dataset.skipped) == len(damaged)


def test_a_batch_follows_from_seed_and_step_and_is_divided_among_processes(make_source, examples, bins, place):
    source = make_source(examples(12))
    first, again = ImageTextDataset(source, bins), ImageTextDataset(source, bins)
    for step in (5, 0, 17):
        whole = [example.name for example in first.batch(place(step, size=4))]
        parts = [again.batch(place(step, part=part, parts=2)) for part in range(2)]
        assert [example.name for part in parts for example in part] == whole


def test_latents_are_taken_as_they_are_and_come_before_a_picture(make_source, picture, array, bins, place):
    latents = np.random.default_rng(0).standard_normal((4, 6, 12)).astype(np.float16)
    dataset = ImageTextDataset(
        make_source({"a": {"npy": array(latents), "png": picture(64, 64), "txt": b"a cat"}}), bins
    )
    assert dataset[0].is_latent
    assert np.array_equal(dataset[0].content, latents)
    assert dataset.batch(place(0))[1].is_latent


def test_a_data_loader_takes_it(examples, write_files, tmp_path, bins):
    dataset = ImageTextDataset(write_files(tmp_path, examples(4)), bins)
    loader = DataLoader(dataset, batch_size=3, collate_fn=lambda batch: [example.name for example in batch])
    assert list(loader) == [["000.png", "001.png", "002.png"], ["003.png"]]


def test_a_number_beyond_the_last_is_an_index_error(examples, write_files, tmp_path, bins):
    dataset = ImageTextDataset(write_files(tmp_path, examples(2)), bins)
    with pytest.raises(IndexError, match="from 0 to 1, got 2"):
        dataset[2]


def test_if_nothing_can_be_read_the_error_says_so_and_names_one(write_files, tmp_path, bins, place):
    dataset = ImageTextDataset(write_files(tmp_path, {"a": {"png": b"junk", "txt": b"x"}, "b": {"png": b""}}), bins)
    with pytest.raises(ValueError, match=r"none of 2 examples can be read: a.png: is no picture"):
        dataset[0]
    with pytest.raises(ValueError, match="none of 2 examples"):
        dataset.batch(place(0))


def test_a_source_without_examples_is_refused(tmp_path, bins):
    with pytest.raises(FileNotFoundError, match="no folder or shard"):
        ImageTextDataset(tmp_path / "missing", bins)
    (tmp_path / "notes.txt").write_text("nothing here")
    for source in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="neither .tar shards nor pictures"):
            ImageTextDataset(source, bins)
    (tmp_path / "shard.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="shard.tar.gz: compressed shards"):
        ImageTextDataset(tmp_path, bins)


def test_a_shard_that_is_cut_off_gives_what_it_has(tmp_path, examples, write_tar, bins):
    path = write_tar(tmp_path / "a.tar", examples(6))
    path.write_bytes(path.read_bytes()[:20_000])
    write_tar(tmp_path / "b.tar", {"z": examples(1)["000"]})
    dataset = ImageTextDataset(tmp_path, bins)
    assert 2 <= len(dataset) < 7
    assert dataset[len(dataset) - 1].name == "b.tar:z"
    assert "a.tar" in dataset.skipped.reasons


def test_several_captions_stay_together_with_their_scores(make_source, picture, bins):
    content = {"captions": ["a cat", "a small cat"], "scores": [20.5, 31]}
    dataset = ImageTextDataset(make_source({"a": {"png": picture(64, 64), "json": json.dumps(content).encode()}}), bins)
    assert dataset[0].captions.texts == ("a cat", "a small cat")
    assert dataset[0].captions.scores == (20.5, 31.0)
