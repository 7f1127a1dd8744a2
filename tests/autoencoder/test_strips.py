"""Strips: what each layer sees is what its rule says, and a picture in strips is the whole picture, in less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autoencoder_variants import VARIANTS
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sana_sprint.autoencoder.blocks import EfficientViTBlock, MultiscaleLinearAttention, ResBlock
from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.autoencoder.resample import DCDownBlock2d, DCUpBlock2d
from sana_sprint.autoencoder.strips import apply_in_strips, halo_of, scale_of
from sana_sprint.layers.feed_forward import GLUMBConv
from sana_sprint.layers.norms import ChannelRMSNorm
from sana_sprint.memory.tracker import PeakBytes

SAME: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}  # float32, the same sums by convolutions of other sizes


def heights_seen(model: AutoencoderDC, kind: type[nn.Module]) -> list[int]:
    """A list that, from now on, grows by the rows of every input of a layer of this kind."""
    heights: list[int] = []
    for layer in model.modules():
        if isinstance(layer, kind):
            layer.register_forward_pre_hook(lambda _, arguments: heights.append(arguments[0].shape[2]))
    return heights


def operations(run: Callable[[], object]) -> int:
    """Multiplications and additions of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# What each layer sees


LAYERS = {
    "pointwise_convolution": (lambda: nn.Conv2d(4, 4, 1), 0),
    "convolution": (lambda: nn.Conv2d(4, 4, 3, padding=1), 1),
    "wide_convolution": (lambda: nn.Conv2d(4, 4, 5, padding=2), 2),
    "rms_norm": (lambda: ChannelRMSNorm(4), 0),
    "batch_norm": (lambda: nn.BatchNorm2d(4), 0),
    "activation": (nn.SiLU, 0),
    "residual": (lambda: ResBlock(4, "rms_norm", "silu"), 2),
    "residual_batch_norm": (lambda: ResBlock(4, "batch_norm", "relu"), 2),
    "feed_forward": (lambda: GLUMBConv(4, 4, norm_type="rms_norm"), 1),
    "up_by_interpolation": (lambda: DCUpBlock2d(4, 4, interpolate=True), 1),
    "up_by_shuffling": (lambda: DCUpBlock2d(4, 4, interpolate=False), 1),
    "down_by_stride": (lambda: DCDownBlock2d(4, 4, unshuffle=False), 2),
    "down_by_shuffling": (lambda: DCDownBlock2d(4, 4, unshuffle=True), 2),
    "down_without_shortcut": (lambda: DCDownBlock2d(4, 4, unshuffle=False, shortcut=False), 2),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_sees_as_far_as_its_halo_says_and_no_further(draw, name):
    make, halo = LAYERS[name]
    layer, x = make().eval(), draw(1, 4, 16, 4)
    for parameter in layer.parameters():
        parameter.copy_(draw(*parameter.shape, seed=1))
    assert halo_of(layer) == halo
    y, scale = layer(x), scale_of(layer)
    assert y.shape[2] == 16 * scale
    seen = 0
    for row in range(16):
        changed = x.clone()
        changed[:, :, row] += 1
        for found in (layer(changed) != y).any(dim=(0, 1, 3)).nonzero().flatten().tolist():
            first = int(found / scale)  # of the rows that this row of the result stands for
            last = first + max(scale.denominator, 1) - 1
            seen = max(seen, first - row, row - last)
    # Whole cells of two rows where the resolution is halved.
    assert halo - scale.denominator < seen <= halo


@pytest.mark.parametrize(
    "layer",
    [
        MultiscaleLinearAttention(8, 8, (5,), "rms_norm"),
        EfficientViTBlock(8, 8, (), "rms_norm"),
        nn.BatchNorm2d(8).train(),
        ResBlock(8, "batch_norm", "relu").train(),
        nn.AdaptiveAvgPool2d(1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_looks_at_the_whole_image_or_is_unknown_has_no_halo(layer):
    assert halo_of(layer) is None


# Strips are the whole


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_picture_in_strips_of_any_height_is_the_whole_picture(make_autoencoder, draw, name):
    model = make_autoencoder(**VARIANTS[name])
    latents, pictures = draw(2, 4, 5, 3), draw(2, model.config.in_channels, 20, 12)
    model.disable_strips()
    whole = model.decode(latents).sample, model.encode(pictures).latent
    for rows in range(1, 21):
        model.enable_strips(rows)
        for found, expected in zip((model.decode(latents).sample, model.encode(pictures).latent), whole, strict=True):
            torch.testing.assert_close(found, expected, **SAME, msg=lambda text, rows=rows: f"{rows} rows: {text}")
            assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("height", [1, 2, 3, 7, 16])
@torch.no_grad()
def test_a_picture_of_any_height_in_strips_is_the_whole_picture(make_autoencoder, draw, height):
    model, latents = make_autoencoder(**VARIANTS["sana"]), draw(1, 4, height, 2)
    model.disable_strips()
    whole = model.decode(latents).sample
    for rows in (1, 3, 5, 4 * height - 1, 4 * height):
        model.enable_strips(rows)
        torch.testing.assert_close(model.decode(latents).sample, whole, **SAME)


@torch.no_grad()
def test_bfloat16_in_strips_is_as_near_to_float32_as_the_whole_picture(make_autoencoder, draw):
    model, latents = make_autoencoder(**VARIANTS["sana"]), draw(1, 4, 8, 8)
    exact = model.decode(latents).sample
    model.to(torch.bfloat16).enable_strips(4)
    found = model.decode(latents.bfloat16()).sample
    model.disable_strips()
    whole = model.decode(latents.bfloat16()).sample
    assert found.dtype == torch.bfloat16
    # Another order of the sums: two results of the same rounding, a few hundredths of it apart at most.
    assert (found.float() - exact).norm() < 1.1 * (whole.float() - exact).norm()


@torch.no_grad()
def test_a_layer_of_a_kind_that_nobody_knows_sees_the_whole_picture(make_autoencoder, draw):
    class LessItsMean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(dim=(2, 3), keepdim=True)

    model, latents = make_autoencoder(), draw(1, 4, 8, 4)
    model.decoder.up_blocks[0].append(LessItsMean())
    heights = heights_seen(model, LessItsMean)
    model.disable_strips()
    whole = model.decode(latents).sample
    model.enable_strips(4)
    torch.testing.assert_close(model.decode(latents).sample, whole, **SAME)
    assert heights == [32, 32]


@torch.no_grad()
def test_a_layer_that_works_in_place_does_not_spoil_the_next_strip(draw):
    layers = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.SiLU(inplace=True),
    ]
    x = draw(1, 4, 11, 5)
    torch.testing.assert_close(apply_in_strips(layers, x, 2), nn.Sequential(*layers)(x), **SAME)


@torch.no_grad()
def test_a_picture_in_strips_is_the_whole_picture_where_adapters_were_injected(make_autoencoder, draw):
    model, latents = make_autoencoder(**VARIANTS["sana"]), draw(1, 4, 5, 3)
    plain = model.decode(latents).sample
    config = LoraConfig(r=2, target_modules=["conv1", "conv", "conv_inverted"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    model.disable_strips()
    whole = model.decode(latents).sample
    assert not torch.allclose(whole, plain, atol=1e-3)
    model.enable_strips(4)
    torch.testing.assert_close(model.decode(latents).sample, whole, **SAME)


@pytest.mark.parametrize("interpolate", [True, False], ids=["interpolate", "shuffle"])
@torch.no_grad()
def test_convolutions_that_were_exchanged_for_torchs_own_are_the_same_in_strips(draw, interpolate):
    layers, x = [ResBlock(4, "rms_norm", "silu"), DCUpBlock2d(4, 4, interpolate)], draw(1, 4, 11, 5)
    for layer in layers:
        for name, conv in list(layer.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(layer, name, nn.Conv2d(4, conv.out_channels, 3, padding=1))
    torch.testing.assert_close(apply_in_strips(layers, x, 2), nn.Sequential(*layers)(x), **SAME)


# Operations


@torch.no_grad()
def test_strips_within_a_picture_compute_no_row_that_is_thrown_away(draw):
    x = draw(1, 4, 20, 3)
    block = ResBlock(4, "rms_norm", "silu")
    row = operations(lambda: block(x)) / (2 * 20)  # of one convolution
    # Four times four rows within, of six by the first convolution; at either end two, of four by both.
    assert operations(lambda: apply_in_strips([block], x, 4)) == (4 * (6 + 4) + 2 * (4 + 4)) * row
    up = DCUpBlock2d(4, 4, interpolate=False)
    row = operations(lambda: up(x)) / 20
    # Nine times two rows within, which are four of the result; at either end one, with its neighbour.
    assert operations(lambda: apply_in_strips([up], x, 4)) == (9 * 2 + 2 * 2) * row


@pytest.mark.parametrize("half", ["encode", "decode"])
@torch.no_grad()
def test_strips_of_the_default_height_add_three_hundredths_to_the_operations_at_most(make_autoencoder, draw, half):
    model = make_autoencoder(**VARIANTS["sana"])
    work, x = getattr(model, half), draw(1, 4, 128, 1) if half == "decode" else draw(1, 3, 512, 4)
    in_strips = operations(lambda: work(x))
    model.disable_strips()
    whole = operations(lambda: work(x))
    assert whole < in_strips < 1.03 * whole


# Memory


@pytest.mark.parametrize("half", ["encode", "decode"])
@torch.no_grad()
def test_local_layers_never_see_more_rows_than_a_strip_and_its_halos(make_autoencoder, draw, half):
    model = make_autoencoder(**VARIANTS["sana"])
    work, x = getattr(model, half), draw(1, 4, 30, 2) if half == "decode" else draw(1, 3, 120, 8)
    heights = {kind: heights_seen(model, kind) for kind in (ResBlock, DCUpBlock2d, GLUMBConv, DCDownBlock2d)}
    attention = []
    for layer in model.modules():
        if isinstance(layer, MultiscaleLinearAttention):
            layer.register_forward_hook(lambda _, arguments, result: attention.append(result.shape[2]))
    model.enable_strips(8)
    work(x)
    assert attention == [30]
    assert max(heights[ResBlock]) == 8 + 2 * 2
    assert max(heights[GLUMBConv]) == 8 + 2 * 1
    if half == "decode":
        assert max(heights[DCUpBlock2d]) == 4 + 2 * 1  # these give eight rows
    else:
        assert max(heights[DCDownBlock2d]) == 16 + 2 * 2  # likewise


@torch.no_grad()
def test_a_longer_picture_takes_no_more_memory_than_itself(make_autoencoder, draw):
    model = make_autoencoder(**VARIANTS["lite"])  # all of its decoder is local
    grown = []
    for switch in (lambda: model.enable_strips(8), model.disable_strips):
        switch()
        peaks = []
        for height in (32, 128):
            latents = draw(1, 4, height, 8)
            with PeakBytes() as memory:
                model.decode(latents)
            peaks.append(memory.peak)
        grown.append(peaks[1] - peaks[0])
    # Per row of 8 latent cells in float32: the picture, of 4 x 32 pixels, and what the first local layer is given,
    # 4 channels of latents in channels-last memory and their 16 of the projection.
    row = 4 * (3 * 4 * 32 + (4 + 16) * 8)
    assert grown[0] <= 96 * row
    assert grown[1] > 2 * 96 * row


# When there are no strips


@torch.no_grad()
def test_a_picture_no_higher_than_a_strip_is_decoded_in_one_piece(make_autoencoder, draw):
    model, latents = make_autoencoder(), draw(1, 4, 4, 5)
    assert (model.use_strips, model.strip_rows) == (True, 64)
    heights = heights_seen(model, ResBlock)
    model.enable_strips(16)
    model.decode(latents)
    assert heights == [8, 16]
    model.enable_strips(15)
    model.decode(latents)
    assert len(heights) > 4
    model.disable_strips()
    del heights[:]
    model.decode(latents)
    assert heights == [8, 16]


def test_gradients_are_those_of_the_whole_picture(make_autoencoder, draw):
    model, pictures = make_autoencoder(), draw(1, 3, 24, 8)
    heights = heights_seen(model, ResBlock)
    gradients = []
    for switch in (lambda: model.enable_strips(4), model.disable_strips):
        switch()
        model.zero_grad()
        model(pictures).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert heights == [24, 12, 12, 24] * 2
    model.enable_strips(4)
    model.requires_grad_(False)
    pictures.requires_grad_()
    model(pictures).sample.sum().backward()
    assert pictures.grad.abs().min() > 0
    assert heights == [24, 12, 12, 24] * 3
    del heights[:]
    model(pictures.detach())  # nothing to differentiate, although gradients are on
    assert max(heights) == 4 + 2 * 2


@torch.no_grad()
def test_statistics_of_a_batch_norm_in_training_are_those_of_the_whole_picture(make_autoencoder, draw):
    models = [make_autoencoder(**VARIANTS["in"]).train() for _ in range(2)]
    models[0].enable_strips(4)
    models[1].disable_strips()
    first, second = (model.decode(draw(1, 4, 6, 4)).sample for model in models)
    torch.testing.assert_close(first, second, **SAME)
    for name, value in models[1].named_buffers():
        torch.testing.assert_close(dict(models[0].named_buffers())[name], value, **SAME)


@torch.no_grad()
def test_a_compiled_decode_is_whole_and_one_graph(make_autoencoder, draw):
    torch._dynamo.reset()
    model, latents = make_autoencoder(**VARIANTS["lite"]), draw(1, 4, 5, 3)
    model.disable_strips()
    whole = model.decode(latents).sample
    model.enable_strips(4)
    torch.testing.assert_close(torch.compile(model.decode, fullgraph=True, backend="eager")(latents).sample, whole)
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_on_layers_are_called_for_every_strip_and_those_on_stages_for_none(make_autoencoder, draw):
    model, calls = make_autoencoder(**VARIANTS["sana"]), {"stage": 0, "layer": 0}

    def count(name: str, module: nn.Module) -> None:
        def hook(*_: Any) -> None:
            calls[name] += 1

        module.register_forward_hook(hook)

    for stage in model.decoder.up_blocks:
        count("stage", stage)
    count("layer", model.decoder.conv_out)
    model.enable_strips(4)
    model.decode(draw(1, 4, 4, 4))
    assert calls["stage"] == 0
    assert calls["layer"] >= 4  # sixteen rows, four at a time at most
    model.disable_strips()
    model.decode(draw(1, 4, 4, 4))
    assert calls["stage"] == 3


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@torch.no_grad()
def test_strips_of_an_offloaded_autoencoder_give_the_same(make_autoencoder, draw, offload_type):
    model, latents = make_autoencoder(), draw(1, 4, 5, 3)
    model.enable_strips(4)
    expected = model.decode(latents).sample
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    # A machine without an accelerator offloads to itself: what is tested is that the hooks meet every module.
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload_type, **blocks)
    assert torch.equal(model.decode(latents).sample, expected)


# With tiles and slices


@torch.no_grad()
def test_tiles_that_were_asked_for_are_taken_and_each_is_in_strips(make_autoencoder, draw):
    model, latents = make_autoencoder(), draw(3, 4, 9, 6)
    model.disable_strips()
    whole = model.decode(latents).sample
    model.enable_tiling(16, 16, 12, 12)
    model.enable_slicing()
    tiled = model.decode(latents).sample
    pieces = []
    model.decoder.register_forward_pre_hook(lambda _, arguments: pieces.append(tuple(arguments[0].shape)))
    heights = heights_seen(model, ResBlock)
    model.enable_strips(4)
    found = model.decode(latents).sample
    torch.testing.assert_close(found, tiled, **SAME)
    assert not torch.allclose(found, whole, atol=1e-3)
    assert pieces == [(1, 4, 4, 4)] * 3 * 3 * 2
    assert max(heights) == 4 + 2 * 2
    model.disable_tiling()
    model.disable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, whole, **SAME)


@pytest.mark.parametrize("rows", [0, -4, 2.5, "8"])
def test_strips_of_no_whole_number_of_rows_are_refused_and_change_nothing(make_autoencoder, rows):
    model = make_autoencoder()
    model.disable_strips()
    with pytest.raises(ValueError, match=f"a strip must have a whole number of rows, at least 1, got {rows!r}"):
        model.enable_strips(rows)
    assert (model.use_strips, model.strip_rows) == (False, 64)
    model.enable_strips()
    assert (model.use_strips, model.strip_rows) == (True, 64)
    model.strip_rows = rows
    with pytest.raises(ValueError, match="a strip must have a whole number of rows"):
        model.decode(torch.zeros(1, 4, 2, 2))
