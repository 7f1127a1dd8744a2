"""Prompt embeddings on disk: the same numbers back without their padding, one file whole or none, wrong files named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sana_sprint.text.encoder import drop_padding
from sana_sprint.text.storage import load_prompt_embeds, save_prompt_embeds

PROMPTS = ["a red circle", "猫 and a “cat”"]
MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0]])


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompt.safetensors"


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_loaded_is_what_was_saved_without_columns_of_padding(embeds, path, dtype, mask_dtype):
    embeds, mask = embeds.to(dtype), MASK.to(mask_dtype)
    save_prompt_embeds(path, embeds, mask)
    loaded = load_prompt_embeds(path)
    assert list(loaded) == ["prompt_embeds", "prompt_attention_mask"]
    assert loaded["prompt_embeds"].dtype == dtype
    assert torch.equal(loaded["prompt_embeds"], embeds[:, [0, 1, 3]])
    assert loaded["prompt_attention_mask"].dtype == mask_dtype
    assert torch.equal(loaded["prompt_attention_mask"], mask[:, [0, 1, 3]])


@pytest.mark.parametrize("mask", [MASK, MASK[:, :2], torch.zeros(2, 6)], ids=["ragged", "full", "empty"])
def test_a_network_is_told_the_same_of_what_is_loaded(embeds, path, mask):
    given = embeds[:, : mask.shape[1]], mask
    save_prompt_embeds(path, *given)
    for told, expected in zip(drop_padding(*load_prompt_embeds(path).values()), drop_padding(*given)):
        assert (told is expected is None) or torch.equal(told, expected)


def test_embeddings_of_a_graph_and_of_another_layout_are_saved_as_numbers(embeds, path):
    other = embeds.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    save_prompt_embeds(str(path), other * 1, torch.ones(2, 6))
    loaded = load_prompt_embeds(str(path))["prompt_embeds"]
    assert torch.equal(loaded, embeds)
    assert not loaded.requires_grad


def test_prompts_are_kept_for_those_who_look_into_the_file(embeds, path):
    save_prompt_embeds(path, embeds, MASK, prompts=PROMPTS)
    assert json.loads(metadata_of(path)["prompts"]) == PROMPTS
    assert load_prompt_embeds(path).keys() == {"prompt_embeds", "prompt_attention_mask"}
    save_prompt_embeds(path, embeds[:1], MASK[:1], prompts=PROMPTS[0])
    assert json.loads(metadata_of(path)["prompts"]) == PROMPTS[:1]
    save_prompt_embeds(path, embeds, MASK)
    assert "prompts" not in metadata_of(path)


def test_what_is_loaded_may_be_edited_without_the_file(embeds, path):
    save_prompt_embeds(path, embeds, MASK)
    first = load_prompt_embeds(path)["prompt_embeds"]
    expected = first.clone()
    first.zero_()
    assert torch.equal(load_prompt_embeds(path)["prompt_embeds"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_attention_mask": MASK[:, :4]}, r"same batch and length, got \(2, 6, 3\) and \(2, 4\)"),
        ({"prompt_attention_mask": None}, "need their prompt_attention_mask"),
        ({"prompts": "one"}, "one for each row of prompt_embeds, got 1 for 2"),
        ({"prompts": []}, "non-empty list of strings"),
        ({"prompts": ["one", 2]}, "strings only"),
    ],
)
def test_what_does_not_belong_together_is_not_written(embeds, path, change, message):
    with pytest.raises(ValueError, match=message):
        save_prompt_embeds(path, **{"prompt_embeds": embeds, "prompt_attention_mask": MASK, **change})
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, which stands for a full disk")
def test_a_file_that_cannot_be_written_whole_leaves_what_was_there(embeds, path):
    save_prompt_embeds(path, embeds, MASK)
    before = path.read_bytes()
    partial = path.with_name(f"{path.name}.partial")
    partial.symlink_to("/dev/full")  # takes no bytes, as a disk without room
    with pytest.raises(OSError, match="No space left"):
        save_prompt_embeds(path, embeds + 1, MASK)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_who_reads_a_file_while_it_is_replaced_reads_the_one_before(embeds, path):
    save_prompt_embeds(path, embeds, MASK)
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_prompt_embeds(path, embeds + 1, MASK)
        assert reader.read() == before
    assert torch.equal(load_prompt_embeds(path)["prompt_embeds"], (embeds + 1)[:, [0, 1, 3]])


def test_a_file_that_is_cut_short_is_named(embeds, path):
    save_prompt_embeds(path, embeds, MASK, prompts=PROMPTS)
    whole = path.read_bytes()
    for length in (0, 7, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"prompt\.safetensors is no intact safetensors file"):
            load_prompt_embeds(path)


OURS = {"sana_sprint.prompt_embeds": "1"}
PAIR = {"prompt_embeds": torch.zeros(1, 2, 3), "prompt_attention_mask": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (PAIR, None, "is not one of prompt embeddings"),
        (PAIR, {"format": "pt"}, "is not one of prompt embeddings"),
        (PAIR, {"sana_sprint.prompt_embeds": "2"}, "in format 1, it is of format 2"),
        ({"weight": torch.zeros(1)}, OURS, "must hold prompt_embeds and prompt_attention_mask, it holds weight"),
        ({}, OURS, "it holds nothing"),
        ({**PAIR, "prompt_attention_mask": torch.ones(1, 3)}, OURS, r"same batch and length, got \(1, 2, 3\)"),
    ],
)
def test_a_file_of_something_else_is_named_with_what_it_holds(path, tensors, metadata, message):
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message) as refusal:
        load_prompt_embeds(path)
    assert str(path) in str(refusal.value)


def test_a_file_that_is_not_there_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"prompt\.safetensors"):
        load_prompt_embeds(path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_embeddings_go_to_disk_from_a_gpu_and_back(embeds, path):
    save_prompt_embeds(path, embeds.cuda(), MASK.cuda())
    loaded = load_prompt_embeds(path, device="cuda")
    assert {tensor.device.type for tensor in loaded.values()} == {"cuda"}
    assert torch.equal(loaded["prompt_embeds"].cpu(), embeds[:, [0, 1, 3]])
