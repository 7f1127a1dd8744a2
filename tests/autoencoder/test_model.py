"""The autoencoder as callers use it: sizes, slices, tiles, gradients, compilation, storage."""

from typing import Any

import pytest
import torch

from sana_sprint.autoencoder.model import AutoencoderDC

SAME: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}  # float32, the same sums in batches of another size


@pytest.mark.parametrize("size", [(18, 16), (16, 1), (30, 30)], ids=str)
@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
def test_c10_a_picture_of_a_size_without_latents_is_refused(make_autoencoder, size, tiling):
    model = make_autoencoder()
    if tiling:
        model.enable_tiling(8, 8)
    message = f"picture height and width must be multiples of 4, got {size[0]}x{size[1]}"
    for encode in (model.encode, model.tiled_encode, model):
        with pytest.raises(ValueError, match=message):
            encode(torch.zeros(1, 3, *size))


@torch.no_grad()
def test_slices_give_what_the_batch_gives(make_autoencoder, draw):
    model, pictures = make_autoencoder(), draw(3, 3, 16, 8)
    latents = model.encode(pictures).latent
    decoded = model.decode(latents).sample
    batches = []
    for half in (model.encoder, model.decoder):
        half.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    model.enable_slicing()
    torch.testing.assert_close(model.encode(pictures).latent, latents, **SAME)
    torch.testing.assert_close(model.decode(latents).sample, decoded, **SAME)
    assert batches == [1] * 6
    model.disable_slicing()
    assert torch.equal(model.decode(latents).sample, decoded)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(make_autoencoder, draw):
    model, pictures = make_autoencoder(), draw(3, 3, 16, 8)
    torch.testing.assert_close(model(pictures[1:2]).sample, model(pictures).sample[1:2], **SAME)


@torch.no_grad()
def test_memory_format_does_not_matter(make_autoencoder, draw):
    model, pictures = make_autoencoder(), draw(2, 3, 16, 8)
    expected = model(pictures).sample
    assert torch.equal(model(pictures.contiguous(memory_format=torch.channels_last)).sample, expected)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(pictures).sample, expected, **SAME)


# Tiling


@pytest.mark.parametrize("size", [(20, 20), (21, 17), (16, 40), (7, 9)], ids=str)
@torch.no_grad()
def test_a4_tiles_smaller_than_the_default_stride_keep_the_whole_picture(make_autoencoder, draw, size):
    model = make_autoencoder()
    model.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    assert (model.tile_sample_stride_height, model.tile_sample_stride_width) == (28, 28)
    assert (model.tile_latent_min_height, model.tile_latent_min_width) == (8, 8)
    latents = draw(1, 4, *size)
    pictures = model.decode(latents).sample
    assert pictures.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert model.encode(pictures).latent.shape == latents.shape
    # Nothing is filled with zeros: every row and every column comes from a tile.
    assert pictures.abs().amax((0, 1, 2)).min() > 0
    assert pictures.abs().amax((0, 1, 3)).min() > 0


@torch.no_grad()
def test_a_tile_is_the_whole_picture_away_from_its_neighbours(make_autoencoder, draw):
    # ResBlocks alone see 7 latent cells to each side at most, fewer than the 8 by which these tiles overlap: where
    # one tile is alone, its edges are out of sight.
    model = make_autoencoder(decoder_block_types="ResBlock")
    latents = draw(1, 4, 40, 51)
    whole = model.decode(latents).sample
    model.enable_tiling(96, 96, 64, 64)  # tiles of 24 cells that begin at 0 and 16, and at 0, 16 and 27
    tiled = model.decode(latents).sample
    assert not torch.equal(tiled, whole)
    for top, bottom in ((0, 16), (24, 40)):
        for left, right in ((0, 16), (24, 27), (40, 51)):
            area = (..., slice(4 * top, 4 * bottom), slice(4 * left, 4 * right))
            torch.testing.assert_close(tiled[area], whole[area], **SAME)


@torch.no_grad()
def test_a_picture_that_fits_in_one_tile_is_not_tiled(make_autoencoder, draw):
    model, latents = make_autoencoder(), draw(2, 4, 4, 6)
    whole = model.decode(latents).sample
    model.enable_tiling(16, 24)
    assert torch.equal(model.decode(latents).sample, whole)
    torch.testing.assert_close(model.tiled_decode(latents).sample, whole, **SAME)
    torch.testing.assert_close(model.tiled_encode(whole).latent, model.encode(whole).latent, **SAME)
    model.enable_tiling(12, 24)
    assert not torch.equal(model.decode(latents).sample, whole)
    model.disable_tiling()
    assert torch.equal(model.decode(latents).sample, whole)


@torch.no_grad()
def test_tiles_and_slices_work_together(make_autoencoder, draw):
    model, latents = make_autoencoder(), draw(3, 4, 9, 6)
    model.enable_tiling(16, 16, 12, 12)
    tiled = model.decode(latents).sample
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, tiled, **SAME)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_sample_min_height": 30}, "tile height must be a positive multiple of 4 pixels, got 30"),
        ({"tile_sample_min_width": 0}, "tile width must be a positive multiple of 4 pixels, got 0"),
        ({"tile_sample_min_width": -32}, "tile width must be a positive multiple of 4 pixels, got -32"),
        ({"tile_sample_stride_height": 30}, "stride height must be a positive multiple of 4 pixels, got 30"),
        ({"tile_sample_stride_width": 0.5}, "stride width must be a positive multiple of 4 pixels, got 0.5"),
        ({"tile_sample_stride_width": 516}, "stride width must be at most the tile width 512, got 516"),
        (
            {"tile_sample_min_height": 32, "tile_sample_stride_height": 36},
            "stride height must be at most the tile height 32, got 36",
        ),
    ],
)
def test_a4_tiles_that_would_lose_a_part_are_refused_and_change_nothing(make_autoencoder, arguments, message):
    model = make_autoencoder()
    before = dict(vars(model))
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**arguments)
    assert {name: value for name, value in vars(model).items() if name.startswith(("tile_", "use_"))} == {
        name: value for name, value in before.items() if name.startswith(("tile_", "use_"))
    }


def test_a4_tiles_assigned_as_attributes_are_checked_when_they_are_used(make_autoencoder):
    model = make_autoencoder()
    model.enable_tiling()
    model.tile_sample_min_height = model.tile_sample_min_width = 256
    with pytest.raises(ValueError, match="stride height must be at most the tile height 256, got 448"):
        model.decode(torch.zeros(1, 4, 65, 65))


def test_tiles_asked_for_once_stay_until_asked_for_again(make_autoencoder):
    model = make_autoencoder()
    model.enable_tiling(64, 32, 48.0, 16.0)
    model.enable_tiling()
    assert (model.tile_sample_min_height, model.tile_sample_stride_height) == (64, 48)
    assert (model.tile_sample_min_width, model.tile_sample_stride_width) == (32, 16)
    model.enable_tiling(tile_sample_min_width=4)
    assert (model.tile_sample_min_height, model.tile_sample_stride_height) == (64, 48)
    assert (model.tile_sample_min_width, model.tile_sample_stride_width) == (4, 4)


@torch.no_grad()
def test_default_tiles_fit_an_autoencoder_of_128_pixels_per_cell(make_autoencoder, draw):
    names = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
    values = (("ResBlock",) * 8, (4,) * 8, (1,) * 8, ((),) * 8)
    halves = ("encoder", "decoder")
    model = make_autoencoder(**{f"{h}_{n}": v for h in halves for n, v in zip(names, values, strict=True)})
    model.enable_tiling()
    assert (model.tile_sample_min_height, model.tile_sample_stride_height) == (512, 384)
    assert model.decode(draw(1, 4, 5, 2)).sample.shape == (1, 3, 640, 256)


# Configs


@pytest.mark.parametrize(
    "config",
    [
        {"encoder_layers_per_block": (1, 1)},
        {"decoder_block_out_channels": (8, 16)},
        {"decoder_norm_types": ("rms_norm",)},
        {"encoder_qkv_multiscales": ()},
        {"decoder_act_fns": ["silu"] * 4},
    ],
    ids=str,
)
def test_lists_of_unequal_length_are_refused(make_autoencoder, config):
    with pytest.raises(ValueError, match="one width, layer count and kernel list per stage, and at least two stages"):
        make_autoencoder(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"encoder_block_types": "ConvBlock"},
        {"decoder_norm_types": "layer_norm"},
        {"decoder_act_fns": "selu"},
        {"decoder_conv_act_fn": "selu"},
    ],
    ids=str,
)
def test_unknown_names_in_a_config_are_refused(make_autoencoder, config):
    (name,) = config.values()
    with pytest.raises(ValueError, match=f"got '{name}'"):
        make_autoencoder(**config)


# Training


def gradients_of(model, pictures) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pictures).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_parameter_and_the_picture_get_a_gradient(make_autoencoder, draw):
    pictures = draw(2, 3, 16, 8).requires_grad_()
    gradients = gradients_of(make_autoencoder(), pictures)
    assert {name for name, gradient in gradients.items() if gradient.abs().max() == 0} == set()
    assert pictures.grad.abs().min() > 0


def test_b15_gradient_checkpointing_gives_the_same_gradients(make_autoencoder, draw):
    model, pictures, calls = make_autoencoder(), draw(2, 3, 16, 8), []
    expected = gradients_of(model, pictures)
    for stage in (model.encoder.down_blocks[0], model.decoder.up_blocks[2]):
        # Not after the block: recomputation stops as soon as nothing more is needed.
        stage[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    found = gradients_of(model, pictures)
    assert len(calls) == 4  # each forward, and once more in the backward pass
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.disable_gradient_checkpointing()
    gradients_of(model, pictures)
    assert len(calls) == 6


def test_the_callers_own_checkpointing_function_meets_every_block(make_autoencoder, draw):
    model, seen = make_autoencoder(), []

    def checkpoint(block, *arguments):
        seen.append(type(block).__name__)
        return block(*arguments)

    model.enable_gradient_checkpointing(checkpoint)
    with torch.no_grad():
        model(draw(1, 3, 8, 8))
    assert seen == []  # there is nothing to recompute
    model(draw(1, 3, 8, 8))
    down = ["ResBlock", "DCDownBlock2d"] * 2 + ["EfficientViTBlock"]
    assert seen == [*down, "EfficientViTBlock", *["DCUpBlock2d", "ResBlock"] * 2]


# Compilation, placement and storage


@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@torch.no_grad()
def test_both_halves_compile_without_a_graph_break(make_autoencoder, draw, tiling):
    torch._dynamo.reset()
    model, latents = make_autoencoder(), draw(1, 4, 5, 6)
    if tiling:
        model.enable_tiling(16, 16, 12, 12)
    decode, encode = (torch.compile(f, fullgraph=True, backend="eager") for f in (model.decode, model.encode))
    pictures = model.decode(latents).sample
    torch.testing.assert_close(decode(latents).sample, pictures, **SAME)
    torch.testing.assert_close(encode(pictures).latent, model.encode(pictures).latent, **SAME)
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_on_a_stage_are_called(make_autoencoder, draw):
    model, widths = make_autoencoder(), []
    for stage in (*model.encoder.down_blocks, *model.decoder.up_blocks):
        stage.register_forward_hook(lambda module, arguments, output: widths.append(output.shape[1]))
    model(draw(1, 3, 8, 8))
    assert widths == [8, 16, 16, 16, 8, 8]


@torch.no_grad()
def test_shortcuts_follow_their_neighbours_to_another_device(make_autoencoder, draw):
    # What a device map does, with the meta device as the other one: inputs follow a module's weights.
    def follow(module, arguments):
        return tuple(argument.to("meta") for argument in arguments)

    model = make_autoencoder()
    model.decoder.to("meta").conv_in.register_forward_pre_hook(follow)
    assert model.decode(draw(1, 4, 2, 3)).sample.shape == (1, 3, 8, 12)
    model.encoder.conv_out.to("meta").register_forward_pre_hook(follow)
    assert model.encode(draw(1, 3, 8, 12)).latent.shape == (1, 4, 2, 3)


@pytest.mark.parametrize(
    "options", [{"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"low_cpu_mem_usage": False}], ids=str
)
@torch.no_grad()
def test_every_way_of_loading_gives_the_same_model(make_autoencoder, draw, tmp_path, options):
    model, pictures = make_autoencoder(), draw(1, 3, 8, 12)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.fp16-*.safetensors"))) > 1
    loaded = AutoencoderDC.from_pretrained(tmp_path, variant="fp16", **options)
    assert torch.equal(loaded(pictures).sample, model(pictures).sample)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@torch.no_grad()
def test_group_offloading_gives_the_same(make_autoencoder, draw, offload_type):
    model, pictures = make_autoencoder(), draw(1, 3, 8, 12)
    expected = model(pictures).sample
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    # A machine without an accelerator offloads to itself: what is tested is that the hooks meet every module.
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload_type, **blocks)
    assert torch.equal(model(pictures).sample, expected)


@torch.no_grad()
def test_float8_storage_computes_in_bfloat16(make_autoencoder, draw):
    model, pictures = make_autoencoder().to(torch.bfloat16), draw(1, 3, 16, 16).bfloat16()
    exact = model(pictures).sample.float()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.decoder.up_blocks[2][0].conv_out.conv_inverted.weight.dtype == torch.float8_e4m3fn
    found = model(pictures).sample
    assert found.dtype == torch.bfloat16
    # Weights of 3 bits through two dozen layers.
    assert (found.float() - exact).norm() < 0.3 * exact.norm()


def test_c1_a_cast_says_nothing(make_autoencoder, capfd):
    make_autoencoder().to(torch.bfloat16)
    assert "should be kept in float32" not in "".join(capfd.readouterr())
