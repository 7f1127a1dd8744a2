"""Training batches from a cache: right, the same again, divided among processes, and never stopped by damage."""

import json

import numpy as np
import pytest
import torch

from sana_sprint.training.datasets.cache_files import CacheDescription
from sana_sprint.training.datasets.cached import CachedLatents
from sana_sprint.training.datasets.captions import CaptionChoice

FIELDS = ("clean", "caption", "mask", "wrong_caption", "wrong_mask")


@pytest.fixture
def cache(examples, write_tar, make_cache, tmp_path):
    """A cache of twelve examples in three shapes."""
    return make_cache(write_tar(tmp_path / "source.tar", examples(12)), tmp_path / "cache")


def row(text, mask):
    """Features without padding, as something that can be compared and collected."""
    return text[mask.bool()].numpy().tobytes()


def known(encoder, captions):
    """Features to caption."""
    texts, _ = encoder.texts(captions)
    return {torch.from_numpy(text).float(): caption for text, caption in zip(texts, captions)}


def caption_of(text, mask, known):
    """The caption with these features."""
    text = text[mask.bool()]
    near = [c for features, c in known.items() if features.shape == text.shape and (features - text).abs().max() < 0.01]
    assert len(near) == 1
    return near[0]


def overwrite(span, content):
    """Put other bytes in the middle of a shard."""
    with span.path.open("r+b") as stream:
        stream.seek(span.offset + span.size - len(content))
        stream.write(content)


def test_a_batch_is_latents_of_one_shape_with_their_captions(cache, encoder, place):
    source = CachedLatents(cache)
    texts = known(encoder, [f"a red circle {number}" for number in range(12)])
    # The examples' shapes come in turn, and their captions say their number.
    shapes = [(4, 6, 12), (4, 8, 8), (4, 12, 6)]
    seen = set()
    for step in range(6):
        batch = source.batch(place(step))
        numbers = [int(caption_of(*one, texts).split()[-1]) for one in zip(batch.caption, batch.mask)]
        assert {shapes[number % 3] for number in numbers} == {tuple(batch.clean.shape[1:])}
        assert (batch.clean.dtype, batch.caption.dtype, batch.mask.dtype) == (torch.float32, torch.float32, torch.long)
        seen |= set(numbers)
    assert seen == set(range(12))  # six batches of two are an epoch


def test_a_step_is_the_same_after_a_resume(cache, place):
    first, again = CachedLatents(cache), CachedLatents(cache)
    batches = [first.batch(place(step), 0.3, misaligned=True) for step in range(8)]
    for step in (6, 2):
        batch = again.batch(place(step), 0.3, misaligned=True)
        assert all(torch.equal(getattr(batch, name), getattr(batches[step], name)) for name in FIELDS)


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_have_the_parts_of_one_batch(parts, cache, place):
    source = CachedLatents(cache)
    for step in range(5):
        whole = source.batch(place(step, size=4), 0.3, misaligned=True)
        each = [
            source.batch(place(step, size=4 // parts, part=part, parts=parts), 0.3, misaligned=True)
            for part in range(parts)
        ]
        assert torch.equal(torch.cat([batch.clean for batch in each]), whole.clean)
        for text, mask in (("caption", "mask"), ("wrong_caption", "wrong_mask")):
            rows = [row(*one) for batch in each for one in zip(getattr(batch, text), getattr(batch, mask))]
            assert rows == [row(*one) for one in zip(getattr(whole, text), getattr(whole, mask))]


def test_a_share_of_the_captions_is_empty(cache, place):
    source = CachedLatents(cache)
    empty = row(*(tensor[0] for tensor in source.empty_caption(1)))
    for share, least, most in ((0.0, 0, 0), (0.3, 30, 90), (1.0, 200, 200)):
        batches = [source.batch(place(step), share) for step in range(100)]
        dropped = sum(row(*one) == empty for batch in batches for one in zip(batch.caption, batch.mask))
        assert least <= dropped <= most


def test_the_empty_caption_is_repeated(cache, tiny_pipeline_parts):
    embeds, mask = CachedLatents(cache).empty_caption(3)
    assert embeds.shape == (3, 1, tiny_pipeline_parts["text_encoder"].config.hidden_size)
    assert mask.tolist() == [[1]] * 3
    assert torch.equal(embeds[0], embeds[2])


@pytest.mark.parametrize("size", [1, 3])
def test_a_wrong_caption_is_that_of_any_other_example(size, cache, place):
    source = CachedLatents(cache)
    wrong = set()
    for step in range(150 // size):
        batch = source.batch(place(step, size=size), misaligned=True)
        assert batch.wrong_caption.shape == batch.caption.shape
        for right, other in zip(zip(batch.caption, batch.mask), zip(batch.wrong_caption, batch.wrong_mask)):
            assert row(*right) != row(*other)
            wrong.add(row(*other))
    assert len(wrong) == 12


def test_wrong_captions_do_not_change_the_right_ones(cache, place):
    source = CachedLatents(cache)
    without, with_wrong = source.batch(place(3)), source.batch(place(3), misaligned=True)
    assert without.wrong_caption is without.wrong_mask is None
    assert torch.equal(without.clean, with_wrong.clean)
    assert list(map(row, without.caption, without.mask)) == list(map(row, with_wrong.caption, with_wrong.mask))


def test_one_example_has_no_wrong_caption(examples, write_tar, make_cache, place, tmp_path):
    source = CachedLatents(make_cache(write_tar(tmp_path / "a.tar", examples(1)), tmp_path / "cache"))
    assert len(source.batch(place(0, size=3)).clean) == 3
    with pytest.raises(ValueError, match="a second example"):
        source.batch(place(0), misaligned=True)


def test_of_several_captions_one_is_drawn_by_its_score(picture, write_files, make_cache, encoder, place, tmp_path):
    captions = ["a red circle", "a blue square", "three yellow triangles"]
    content = {"captions": captions, "scores": [20, 30, 26]}
    example = {"png": picture(64, 64), "json": json.dumps(content).encode()}
    folder = make_cache(write_files(tmp_path / "pictures", {"a": example}), tmp_path / "cache")
    texts = known(encoder, captions)

    def drawn(choice):
        batch = CachedLatents(folder, choice).batch(place(0, size=600))
        found = [caption_of(*one, texts) for one in zip(batch.caption, batch.mask)]
        return [found.count(caption) / 600 for caption in captions]

    # Three standard deviations of a share in 600 draws are at most 0.062.
    np.testing.assert_allclose(drawn(CaptionChoice()), [20 / 76, 30 / 76, 26 / 76], atol=0.062)
    np.testing.assert_allclose(drawn(CaptionChoice(threshold=25)), [0, 30 / 56, 26 / 56], atol=0.062)
    assert drawn(CaptionChoice(temperature=0.001)) == [0, 1, 0]


@pytest.mark.parametrize("damage", ["latent", "text", "latent header"])
def test_a_damaged_example_is_replaced_and_named(damage, cache, place):
    source = CachedLatents(cache)
    record = source.records[5]
    if damage == "latent header":
        with record.files["npy"].path.open("r+b") as stream:
            stream.seek(record.files["npy"].offset)
            stream.write(b"damaged")
    else:
        not_finite = np.full(4, np.nan, np.float16).tobytes()
        overwrite(record.files["npy" if damage == "latent" else "text0.npy"], not_finite)
    damaged = CachedLatents(cache)
    for step in range(12):
        batch = damaged.batch(place(step), misaligned=True)
        assert all(torch.isfinite(getattr(batch, name)).all() for name in FIELDS)
        # The same as if earlier steps had not met the damage.
        resumed = CachedLatents(cache).batch(place(step), misaligned=True)
        assert all(torch.equal(getattr(batch, name), getattr(resumed, name)) for name in FIELDS)
    ending = "text0.npy" if damage == "text" else "npy"
    assert damaged.skipped.reasons.keys() == {f"{record.name}.{ending}"}


def test_a_damaged_caption_does_not_cost_the_others_of_its_example(
    picture, write_files, make_cache, encoder, place, tmp_path
):
    captions = ["a red circle", "a blue square"]
    content = json.dumps({"captions": captions}).encode()
    examples = {str(number): {"png": picture(64, 64, number), "json": content} for number in range(2)}
    folder = make_cache(write_files(tmp_path / "pictures", examples), tmp_path / "cache")
    overwrite(CachedLatents(folder).records[0].files["text0.npy"], np.full(4, np.nan, np.float16).tobytes())
    source, texts = CachedLatents(folder), known(encoder, captions)
    batch = source.batch(place(0, size=200))
    found = [caption_of(*one, texts) for one in zip(batch.caption, batch.mask)]
    assert min(found.count(caption) for caption in captions) > 60
    # Half of the places of the first example, and nothing else, have gone to the second one.
    first, second = sorted(batch.clean.unique(dim=0, return_counts=True)[1].tolist())
    assert 30 < first < 70
    assert 130 < second < 170


def test_a_shape_of_which_nothing_is_left_gives_its_place_to_another(cache, place, caplog):
    source = CachedLatents(cache)
    for index in source.order.members[0]:
        overwrite(source.records[index].files["npy"], np.full(4, np.nan, np.float16).tobytes())
    damaged = CachedLatents(cache)
    assert not caplog.records
    shapes = {tuple(damaged.batch(place(step, parts=2, part=1)).clean.shape[1:]) for step in range(12)}
    assert len(shapes) == 2
    assert len(damaged.skipped) == len(source.order.members[0]) > 1
    (told,) = caplog.records  # of the first
    name, reason = next(iter(damaged.skipped.reasons.items()))
    assert told.getMessage() == f"{name} cannot be read, and is left out, as will be whatever else cannot: {reason}"


def test_if_nothing_can_be_read_the_error_says_so(cache, place):
    for record in CachedLatents(cache).records:
        overwrite(record.files["npy"], np.full(4, np.nan, np.float16).tobytes())
    with pytest.raises(ValueError, match="none of 12 examples can be read"):
        CachedLatents(cache).batch(place(0))


def test_an_unfinished_cache_is_refused_with_what_to_do(cache):
    path = CacheDescription.read(cache).shard_path(cache, 1)
    path.rename(path.with_name(path.name + ".partial"))
    with pytest.raises(ValueError, match=r"not finished, latents-000001-of-000003.tar is missing: run cache-latents"):
        CachedLatents(cache)


def test_what_is_no_cache_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="is no cache of latents: it holds no cache.json"):
        CachedLatents(tmp_path)
    description = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps({**description, "format": 2}))
    with pytest.raises(ValueError, match="format 1, got 2"):
        CachedLatents(cache)


def test_batches_lie_where_they_are_asked_to(cache, place):
    source = CachedLatents(cache)
    moved = source.to(torch.device("meta"))
    batch = moved.batch(place(0), misaligned=True)
    assert {getattr(batch, name).device.type for name in FIELDS} == {"meta"}
    assert source.batch(place(0)).clean.device.type == "cpu"
