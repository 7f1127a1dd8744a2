"""Loading and keeping the transformer: variants, shards, dtypes, device maps, float8 storage, offloading in groups."""

import pytest
import torch

from sana_sprint.transformer.model import SanaTransformer2DModel


@pytest.fixture
def folder(make_transformer, tmp_path):
    make_transformer(interpolation_scale=1.0).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"device_map": "balanced"},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"use_safetensors": True, "disable_mmap": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_way_of_loading_gives_the_same_model(make_transformer, inputs, folder, options):
    expected = make_transformer(interpolation_scale=1.0)(**inputs).sample
    model = SanaTransformer2DModel.from_pretrained(folder, **options)
    assert not model.training
    assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_a_model_split_over_memory_and_disk_gives_the_same(make_transformer, inputs, folder, tmp_path):
    model = SanaTransformer2DModel.from_pretrained(
        folder,
        device_map={
            "patch_embed": "cpu",
            "time_embed": "disk",
            "caption_projection": "cpu",
            "caption_norm": "cpu",
            "transformer_blocks.0": "disk",
            "transformer_blocks.1": "cpu",
            "norm_out": "cpu",
            "proj_out": "disk",
            "scale_shift_table": "cpu",
        },
        offload_folder=tmp_path / "offload",
    )
    assert model.transformer_blocks[0].attn1.to_q.weight.device.type == "meta"
    assert torch.equal(model(**inputs).sample, make_transformer(interpolation_scale=1.0)(**inputs).sample)


@torch.no_grad()
def test_variants_and_shards_are_found(make_transformer, inputs, tmp_path):
    model = make_transformer()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.fp16-*.safetensors"))) > 1
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    with pytest.raises(OSError, match="no file named"):
        SanaTransformer2DModel.from_pretrained(tmp_path)


def test_a_dtype_asked_for_is_that_of_all_weights_and_says_nothing(folder, capfd):
    model = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "should be kept in float32" not in "".join(capfd.readouterr())


def in_bfloat16(inputs):
    return {k: v.bfloat16() if k in ("hidden_states", "encoder_hidden_states") else v for k, v in inputs.items()}


@torch.no_grad()
def test_float8_storage_computes_in_bfloat16(make_transformer, inputs):
    model = make_transformer().to(torch.bfloat16)
    exact = model(**in_bfloat16(inputs)).sample.float()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        # The last two are diffusers' rules for every model: the final projection, and what is no layer's weight.
        is_wide = any(part in name for part in ("norm", "patch_embed", "proj_out", "scale_shift_table"))
        assert parameter.dtype == (torch.bfloat16 if is_wide else torch.float8_e4m3fn), name
    found = model(**in_bfloat16(inputs)).sample
    assert found.dtype == torch.bfloat16
    # Weights of 3 bits: each product is off by up to 6 %, the sum of them by about half as much.
    assert (found.float() - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
@torch.no_grad()
def test_group_offloading_gives_the_same(make_transformer, inputs, options):
    model = make_transformer()
    expected = model(**inputs).sample
    if options["offload_type"] == "block_level":
        options = {**options, "num_blocks_per_group": 1}
    # A machine without an accelerator offloads to itself: what is tested is that the hooks meet every module.
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options)
    assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_autocast_computes_in_half_precision(make_transformer, inputs):
    model = make_transformer()
    exact = model(**inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs).sample
    # Products of 8 bits each, some tens per sum, a dozen layers.
    assert 0 < (found.float() - exact).norm() < 0.1 * exact.norm()
