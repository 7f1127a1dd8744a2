"""LoRA files through the pipelines: from and to diffusers, several at once with a weight each, fused and taken out."""

from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch.testing import assert_close

from sana_sprint import SanaSprintImg2ImgPipeline, SanaSprintPipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
SAME: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}  # float32, weights merged or not, two steps


@pytest.fixture
def own_pipe(tiny_pipeline_parts):
    """A pipeline with a transformer of its own, which adapters may change."""
    parts = {**tiny_pipeline_parts, "transformer": deepcopy(tiny_pipeline_parts["transformer"])}
    pipeline = SanaSprintPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def lora_folders(tiny_pipeline_parts, tmp_path_factory):
    """Two LoRA files of diffusers, of another rank and on other layers."""
    folders = []
    for seed, (rank, targets) in enumerate([(4, TARGETS), (2, ["to_v", "conv_point"])]):
        transformer = deepcopy(tiny_pipeline_parts["transformer"])
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
        folder = tmp_path_factory.mktemp("lora")
        layers = get_peft_model_state_dict(transformer)
        diffusers.SanaSprintPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        folders.append(folder)
    return folders


@pytest.fixture
def drawn(short, seeded):
    """Latents that a pipeline draws."""

    def draw(pipeline, **arguments: Any) -> torch.Tensor:
        return pipeline("a red circle", **short, **arguments, generator=seeded(0)).images

    return draw


def add_to_weights(transformer, folder, weight: float) -> None:
    """What an adapter of scale 1 means: the product of its halves, added to the layer's weight."""
    halves, _ = SanaSprintPipeline.lora_state_dict(folder, return_lora_metadata=True)
    layers = {name.removeprefix("transformer.").partition(".lora_")[0] for name in halves}
    assert layers
    with torch.no_grad():
        for layer in layers:
            down, up = (halves[f"transformer.{layer}.lora_{half}.weight"].flatten(1) for half in "AB")
            target = transformer.get_submodule(layer).weight
            target += weight * (up @ down).view_as(target)


def test_several_adapters_with_weights_are_their_products_added_to_the_weights(own_pipe, lora_folders, drawn):
    plain = deepcopy(own_pipe.transformer)
    for name, folder in zip(("first", "second"), lora_folders, strict=True):
        own_pipe.load_lora_weights(folder, adapter_name=name)
    assert own_pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    for weights in ([0.7, -0.4], [0.0, 1.0]):
        own_pipe.set_adapters(["first", "second"], weights)
        assert own_pipe.get_active_adapters() == ["first", "second"]
        by_hand = deepcopy(plain)
        for folder, weight in zip(lora_folders, weights, strict=True):
            add_to_weights(by_hand, folder, weight)
        expected = drawn(SanaSprintPipeline(**{**own_pipe.components, "transformer": by_hand}))
        assert_close(drawn(own_pipe), expected, **SAME)
    own_pipe.delete_adapters("first")
    assert own_pipe.get_list_adapters() == {"transformer": ["second"]}
    assert_close(drawn(own_pipe), expected, **SAME)  # whose first had the weight 0


def test_adapters_are_fused_taken_out_and_unloaded(own_pipe, lora_folders, drawn):
    plain = drawn(own_pipe)
    for name, folder in zip(("first", "second"), lora_folders, strict=True):
        own_pipe.load_lora_weights(folder, adapter_name=name)
    own_pipe.set_adapters(["first", "second"], [0.7, -0.4])
    expected = drawn(own_pipe)
    assert (expected - plain).abs().max() > 0.01
    own_pipe.fuse_lora(adapter_names=["first", "second"])
    assert own_pipe.num_fused_loras == 2
    assert_close(drawn(own_pipe), expected, **SAME)
    own_pipe.unfuse_lora()
    assert own_pipe.num_fused_loras == 0
    assert_close(drawn(own_pipe), expected, **SAME)
    own_pipe.disable_lora()
    assert_close(drawn(own_pipe), plain, **SAME)
    own_pipe.enable_lora()
    assert_close(drawn(own_pipe), expected, **SAME)
    own_pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in own_pipe.transformer.named_modules())
    assert_close(drawn(own_pipe), plain, **SAME)


def test_fused_adapters_stay_when_what_they_came_from_is_unloaded(own_pipe, lora_folders, drawn):
    own_pipe.load_lora_weights(lora_folders[0])
    expected = drawn(own_pipe)
    own_pipe.fuse_lora()
    own_pipe.unload_lora_weights()
    assert_close(drawn(own_pipe), expected, **SAME)


def test_a_file_gives_the_same_picture_in_diffusers(own_pipe, their_pipe, lora_folders, drawn):
    their_pipe.transformer = deepcopy(their_pipe.transformer)
    plain = drawn(own_pipe)
    for pipeline in (own_pipe, their_pipe):
        pipeline.load_lora_weights(lora_folders[0])
    ours, theirs = drawn(own_pipe), drawn(their_pipe)
    assert (ours - plain).abs().max() > 0.01
    assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("saved_by", ["ours", "theirs"])
def test_a_folder_of_peft_itself_loads_in_both_libraries(tiny_pipeline_parts, their_parts, tmp_path, saved_by):
    networks = {"ours": tiny_pipeline_parts["transformer"], "theirs": their_parts["transformer"]}
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    saved = get_peft_model(deepcopy(networks[saved_by]), config).eval()
    saved.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([0.45, 0.45]),
    }
    with torch.no_grad():
        expected, plain = saved(**inputs).sample, networks["ours"](**inputs).sample
        assert (expected - plain).abs().max() > 0.01
        for network in networks.values():
            loaded = PeftModel.from_pretrained(deepcopy(network), tmp_path).eval()
            assert_close(loaded(**inputs).sample, expected, **SAME)


def test_an_adapter_of_one_pipeline_is_that_of_those_made_from_it(own_pipe, lora_folders, short, seeded):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    other = SanaSprintImg2ImgPipeline(**own_pipe.components)
    other.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a red circle", "image": picture, "strength": 0.7, **short}
    plain = other(**arguments, generator=seeded(0)).images
    own_pipe.load_lora_weights(lora_folders[0])
    assert (other(**arguments, generator=seeded(0)).images - plain).abs().max() > 0.01
    other.unload_lora_weights()
    assert_close(other(**arguments, generator=seeded(0)).images, plain, **SAME)
    assert own_pipe.get_list_adapters() == {}


def test_a_file_in_float32_loads_into_a_pipeline_in_bfloat16(own_pipe, lora_folders, drawn):
    own_pipe.transformer.to(torch.bfloat16)
    plain = drawn(own_pipe)
    own_pipe.load_lora_weights(lora_folders[0])
    adapted = drawn(own_pipe)
    assert adapted.isfinite().all()
    assert (adapted - plain).abs().max() > 0.01
    own_pipe.fuse_lora()
    assert_close(drawn(own_pipe), adapted, atol=0.5, rtol=0)  # bfloat16 rounds the sum of weights, too


def test_a_file_that_is_no_lora_is_refused_and_changes_nothing(own_pipe, drawn):
    plain = drawn(own_pipe)
    weights = {f"transformer.{name}": value for name, value in own_pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        own_pipe.load_lora_weights(weights)
    assert torch.equal(drawn(own_pipe), plain)
