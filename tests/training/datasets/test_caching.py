"""Caches of latents and text features: what a pipeline would compute, once, however often and by whoever it is run."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset

from sana_sprint import SanaSprintPipeline
from sana_sprint.conditioning.edges import edges
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.training.data import to_tensor
from sana_sprint.training.datasets.cache_files import CacheDescription
from sana_sprint.training.datasets.cached import CachedLatents
from sana_sprint.training.datasets.caching import CacheSettings, cache_latents
from sana_sprint.training.datasets.image_text import ImageTextDataset

SETTINGS = CacheSettings(model="tiny", size=64, examples_per_shard=4, batch_size=2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cached(folder):
    """Key to decoded files of every example in a cache, as webdataset reads them."""
    samples = {}
    for shard in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False):
            files = {name: content for name, content in sample.items() if not name.startswith("__")}
            samples[sample["__key__"]] = {
                name: json.loads(content) if name == "json" else np.load(io.BytesIO(content))
                for name, content in files.items()
            }
    return samples


@pytest.fixture
def source(examples, write_tar, tmp_path):
    return write_tar(tmp_path / "source.tar", examples(10))


@pytest.fixture
def dataset(source, bins):
    return ImageTextDataset(source, bins)


def test_a_cache_holds_what_a_pipeline_computes(dataset, encoder, tiny_pipeline_parts, tmp_path):
    report = cache_latents(dataset, encoder, tmp_path / "cache", SETTINGS)
    assert (report.num_written, len(report.skipped), report.num_present, report.num_cut) == (10, 0, 0, 0)
    found = cached(tmp_path / "cache")
    assert sorted(found) == [f"{number:09d}" for number in range(10)]

    pipe = SanaSprintPipeline(**tiny_pipeline_parts)
    for number, files in enumerate(found[key] for key in sorted(found)):
        example = dataset[number]
        caption = f"a red circle {number}"
        assert files["json"] == {"name": f"source.tar:{number:03d}", "captions": [caption], "scores": [1.0]}
        embeds, mask = pipe.encode_prompt(
            caption, max_sequence_length=40, complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION
        )
        text = torch.from_numpy(files["text0.npy"])
        assert text.dtype == torch.float16
        assert len(text) == mask.sum()
        # Float16 has 11 bits: one part in 2048 of numbers up to 4.
        torch.testing.assert_close(text.float(), embeds[0, : len(text)], atol=2e-3, rtol=0)
        with torch.no_grad():
            latent = pipe.vae.encode(to_tensor(example.content[None])).latent[0] * pipe.vae.config.scaling_factor
        assert files["npy"].dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(files["npy"]).float(), latent, atol=2e-3, rtol=1e-3)


def test_the_empty_caption_is_there_once_and_without_the_instruction(dataset, encoder, tiny_pipeline_parts, tmp_path):
    cache_latents(dataset, encoder, tmp_path / "cache", SETTINGS)
    embeds, mask = SanaSprintPipeline(**tiny_pipeline_parts).encode_prompt("", max_sequence_length=40)
    empty = torch.from_numpy(np.load(tmp_path / "cache" / "empty.npy"))
    assert len(empty) == mask.sum() == 1
    torch.testing.assert_close(empty.float(), embeds[0, :1], atol=2e-3, rtol=0)  # float16


def test_every_caption_of_an_example_is_encoded(encoder, picture, write_files, bins, tmp_path):
    captions = ["a red circle", "a blue square, three yellow triangles", "a star"]
    files = {"png": picture(64, 64), "json": json.dumps({"captions": captions, "scores": [1, 2, 3]}).encode()}
    source = write_files(tmp_path / "pictures", {"a": files, "b": {"png": files["png"], "txt": b"a red circle"}})
    cache_latents(ImageTextDataset(source, bins), encoder, tmp_path / "cache", SETTINGS)
    found = cached(tmp_path / "cache")
    wanted, _ = encoder.texts(captions)
    assert found["000000000"]["json"]["scores"] == [1, 2, 3]
    for place, text in enumerate(wanted):
        # Read in other batches, so rounded in another way.
        np.testing.assert_allclose(found["000000000"][f"text{place}.npy"], text, atol=4e-3)
    assert set(found["000000001"]) == {"npy", "text0.npy", "json"}


def test_captions_that_are_too_long_are_cut_and_counted(encoder, dataset, tmp_path):
    report = cache_latents(dataset, replace(encoder, captions_tokens=5), tmp_path / "cache", SETTINGS)
    assert report.num_cut == 10
    assert all(len(files["text0.npy"]) == 5 for files in cached(tmp_path / "cache").values())


def test_latents_of_a_source_are_taken_over(encoder, array, write_files, bins, tmp_path):
    latents = np.random.default_rng(0).standard_normal((4, 6, 12)).astype(np.float32)
    source = {
        "good": {"npy": array(latents), "txt": b"a cat"},
        "too large": {"npy": array(latents * 1e6), "txt": b"a cat"},
        "of another model": {"npy": array(latents[:3]), "txt": b"a cat"},
    }
    dataset = ImageTextDataset(write_files(tmp_path / "latents", source), bins)
    report = cache_latents(dataset, encoder, tmp_path / "cache", SETTINGS)
    assert (report.num_written, len(report.skipped)) == (1, 2)
    assert "4 channels, got 3x6x12" in report.skipped.reasons["of another model.npy"]
    assert "not finite in float16" in report.skipped.reasons["too large.npy"]
    (files,) = cached(tmp_path / "cache").values()
    assert np.array_equal(files["npy"], latents.astype(np.float16))


def test_a_cache_is_itself_a_source_of_latents(source, make_cache, bins, tmp_path):
    dataset = ImageTextDataset(make_cache(source, tmp_path / "cache"), bins)
    assert len(dataset) == 10
    assert all(dataset[index].is_latent for index in range(10))
    assert {dataset[index].captions.texts[0] for index in range(10)} == {f"a red circle {n}" for n in range(10)}


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_processes_make_together_what_one_makes(parts, source, make_cache, tmp_path):
    whole = make_cache(source, tmp_path / "whole")
    for part in reversed(range(parts)):
        make_cache(source, tmp_path / "parts", part=part, parts=parts)
    assert contents(tmp_path / "parts") == contents(whole)


def test_a_run_that_failed_goes_on_where_it_stopped(dataset, encoder, source, make_cache, bins, tmp_path):
    whole = make_cache(source, tmp_path / "whole")
    calls = 0

    def stop_in_the_second_shard(module, arguments):
        nonlocal calls
        calls += 1
        if calls == 4:  # the first has three batches, one of each shape
            raise KeyboardInterrupt

    hook = encoder.vae.encoder.register_forward_pre_hook(stop_in_the_second_shard)
    try:
        with pytest.raises(KeyboardInterrupt):
            cache_latents(dataset, encoder, tmp_path / "cache", SETTINGS)
    finally:
        hook.remove()
    left = contents(tmp_path / "cache")
    assert {name for name in left if "latents" in name} == {"latents-000000-of-000003.tar"}
    report = cache_latents(ImageTextDataset(source, bins), encoder, tmp_path / "cache", SETTINGS)
    assert (report.num_present, report.num_written) == (4, 6)
    assert contents(tmp_path / "cache") == contents(whole)


def test_a_second_run_writes_nothing(source, make_cache, tmp_path):
    folder = make_cache(source, tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_cache(source, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_what_is_skipped_is_listed_over_all_runs(examples, write_files, make_cache, bins, tmp_path):
    damaged = {f"{number:03d}x": {"png": b"junk", "txt": b"x"} for number in (0, 4, 8)}
    source = write_files(tmp_path / "pictures", {**examples(9), **damaged})
    folder = make_cache(source, tmp_path / "cache")
    listed = (folder / "skipped-0-of-1.txt").read_text()
    assert listed == "".join(f"{key}.png: is no picture of a known format\n" for key in damaged)
    CacheDescription.read(folder).shard_path(folder, 2).unlink()
    make_cache(source, folder)
    assert (folder / "skipped-0-of-1.txt").read_text() == listed
    assert len(cached(folder)) == 9


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model": "another"}, r"\(model\)"),
        ({"size": 128}, r"\(size\)"),
        ({"examples_per_shard": 5}, r"\(examples_per_shard\)"),
    ],
)
def test_a_cache_is_not_continued_with_other_settings(other, named, source, make_cache, tmp_path):
    folder = make_cache(source, tmp_path / "cache")
    before = contents(folder)
    with pytest.raises(ValueError, match=named):
        make_cache(source, folder, **other)
    assert contents(folder) == before


def test_a_cache_is_not_continued_from_another_source(source, examples, write_tar, make_cache, tmp_path):
    folder = make_cache(source, tmp_path / "cache")
    with pytest.raises(ValueError, match="source, num_examples"):
        make_cache(write_tar(tmp_path / "other.tar", examples(11)), folder)


def test_a_cache_is_not_continued_with_other_captions_in_a_table(picture, write_files, make_cache, tmp_path):
    source = write_files(tmp_path / "pictures", {"a": {"png": picture(64, 64)}})
    (source / "metadata.csv").write_text("file_name,text\na.png,a cat\n")
    folder = make_cache(source, tmp_path / "cache")
    (source / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    with pytest.raises(ValueError, match=r"\(source\)"):
        make_cache(source, folder)


def test_if_nothing_can_be_read_nothing_looks_finished(write_files, make_cache, tmp_path):
    source = write_files(tmp_path / "pictures", {f"{n}": {"png": b"junk", "txt": b"x"} for n in range(6)})
    with pytest.raises(ValueError, match=r"none of 6 examples can be read; the first: 0.png: is no picture"):
        make_cache(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar*"))


def test_sizes_that_the_autoencoder_cannot_take_are_refused_at_once(source, encoder, tmp_path):
    dataset = ImageTextDataset(source, {"1.0": [60.0, 64.0]})
    with pytest.raises(ValueError, match="multiples of 8, got 60x64"):
        cache_latents(dataset, encoder, tmp_path / "cache", SETTINGS)
    assert not (tmp_path / "cache").exists()


def test_a_cache_holds_the_latents_of_each_pictures_edges_if_asked_for(dataset, encoder, tmp_path, place):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    cache_latents(dataset, encoder, tmp_path / "cache", replace(SETTINGS, control="edges"))
    found = cached(tmp_path / "cache")
    for number, files in enumerate(found[key] for key in sorted(found)):
        (wanted,) = encoder.latents([np.asarray(edges(dataset[number].content))])
        # Read in other batches, so rounded in another way.
        np.testing.assert_allclose(files["control.npy"], wanted, atol=4e-3)
    source = CachedLatents(tmp_path / "cache")
    assert source.control == "edges"
    batch = source.batch(place(0))
    by_content = {files["npy"].tobytes(): files["control.npy"] for files in found.values()}
    for clean, control in zip(batch.clean, batch.control, strict=True):
        assert np.array_equal(control.half().numpy(), by_content[clean.half().numpy().tobytes()])

    cache_latents(dataset, encoder, tmp_path / "without", SETTINGS)
    without = CachedLatents(tmp_path / "without")
    assert without.control is None
    assert without.batch(place(0)).control is None
    with pytest.raises(ValueError, match=r"made with other settings \(control\)"):
        cache_latents(dataset, encoder, tmp_path / "without", replace(SETTINGS, control="edges"))
    with pytest.raises(ValueError, match="no control is named 'fog'"):
        cache_latents(dataset, encoder, tmp_path / "fog", replace(SETTINGS, control="fog"))
    assert not (tmp_path / "fog").exists()


def test_latents_have_no_edges(encoder, array, picture, write_files, bins, tmp_path):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    latents = np.random.default_rng(0).standard_normal((4, 6, 12)).astype(np.float32)
    source = {"a": {"npy": array(latents), "txt": b"a cat"}, "b": {"png": picture(64, 64), "txt": b"a cat"}}
    dataset = ImageTextDataset(write_files(tmp_path / "mixed", source), bins)
    report = cache_latents(dataset, encoder, tmp_path / "cache", replace(SETTINGS, control="edges"))
    assert report.num_written == 1
    assert report.skipped.reasons == {"a.npy": "holds latents, and nothing can be drawn after those"}


def test_a_package_that_a_control_lacks_is_named_before_anything_is_written(
    encoder, picture, write_files, bins, tmp_path, monkeypatch
):
    dataset = ImageTextDataset(write_files(tmp_path / "one", {"a": {"png": picture(64, 64), "txt": b"a cat"}}), bins)
    monkeypatch.setitem(sys.modules, "cv2", None)  # what import then takes for missing
    with pytest.raises(ImportError, match="cv2|OpenCV"):
        cache_latents(dataset, encoder, tmp_path / "cache", replace(SETTINGS, control="edges"))
    assert not (tmp_path / "cache").exists()
