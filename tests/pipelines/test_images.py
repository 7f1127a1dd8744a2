"""Sizes asked for and drawn: resolution bins, sizes without bins, and pictures cut to the size asked for."""

import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from torch.testing import assert_close

from sana_sprint import SanaTransformer2DModel
from sana_sprint.pipelines.images import Canvas, choose_canvas, fit_to_canvas, resolution_bins


def canvas(drawn: tuple[int, int], asked: tuple[int, int]) -> Canvas:
    return Canvas(height=drawn[0], width=drawn[1], asked_height=asked[0], asked_width=asked[1])


# 33 of each by the published tables, and 40 of 2048 and 4096.
@pytest.mark.parametrize(("native", "count"), [(512, 33), (1024, 33), (2048, 40), (4096, 40)])
def test_bins_are_multiples_of_32_with_about_the_native_area(native, count):
    bins = resolution_bins(native)
    assert len(bins) == count
    for ratio, (height, width) in bins.items():
        assert height % 32 == width % 32 == 0
        assert height / width == pytest.approx(float(ratio), abs=0.006)  # ratios have two digits
        assert 0.8 < height * width / native**2 < 1.05


def test_the_bins_of_1024_are_those_of_the_published_table():
    bins = resolution_bins(1024)
    assert [bins[ratio] for ratio in ("0.25", "0.57", "1.0", "1.75", "4.0")] == [
        [512, 2048],
        [768, 1344],
        [1024, 1024],
        [1344, 768],
        [2048, 512],
    ]


# B4
@pytest.mark.parametrize(
    ("native", "asked", "drawn"),
    [
        (512, (512, 512), (512, 512)),
        (512, (1000, 1777), (384, 672)),
        (1024, (1000, 500), (1408, 704)),
        (1024, (1, 1), (1024, 1024)),
        (2048, (900, 1600), (1536, 2688)),
        (4096, (4000, 4000), (4096, 4096)),
    ],
)
def test_a_size_is_drawn_in_the_bin_of_the_nearest_shape(native, asked, drawn):
    chosen = choose_canvas(*asked, native_size=native, multiple=32, use_bins=True)
    assert chosen == canvas(drawn, asked)


def test_a_model_of_another_size_draws_the_size_asked_for():
    assert choose_canvas(96, 160, native_size=64, multiple=8, use_bins=True) == canvas((96, 160), (96, 160))
    assert choose_canvas(None, None, native_size=64, multiple=8, use_bins=True) == canvas((64, 64), (64, 64))


@pytest.mark.parametrize("native", [64, 1024])
def test_a_size_that_cannot_be_drawn_is_refused_with_the_multiple_wanted(native):
    with pytest.raises(ValueError, match="height and width must be multiples of 32, got 1000x500"):
        choose_canvas(1000, 500, native_size=native, multiple=32, use_bins=native == 64)


@pytest.mark.parametrize("asked", [(64, 64), (50, 70), (70, 50), (128, 32), (17, 200)])
def test_pictures_get_the_size_asked_for_as_in_diffusers(asked):
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 64, 64)
    ours = fit_to_canvas(pictures, canvas((64, 64), asked))
    assert ours.shape == (2, 3, *asked)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(pictures, new_width=asked[1], new_height=asked[0])
    assert_close(ours, theirs, atol=0, rtol=0)


def test_no_row_is_lost_where_diffusers_rounds_a_size_down():
    """704 * (359 / 704) is 358.99999999999994: diffusers resizes to 358 rows and crops to one."""
    pictures = torch.rand(1, 3, 704, 704)
    assert PixArtImageProcessor.resize_and_crop_tensor(pictures, 359, 359).shape[-2] < 359
    assert fit_to_canvas(pictures, canvas((704, 704), (359, 359))).shape == (1, 3, 359, 359)


# B4, in a call: sample sizes of 16 to 128 with the published 32 times smaller latents, here with 8 times smaller ones
def test_a_call_draws_the_bin_and_returns_the_size_asked_for(pipe, tiny_pipeline_parts, short):
    config = tiny_pipeline_parts["transformer"].config
    pipe.transformer = SanaTransformer2DModel.from_config(config, sample_size=64).eval()  # 512 pixels
    asked = {**short, "use_resolution_binning": True, "height": 100, "width": 178}
    assert pipe("a red circle", **asked, num_inference_steps=1).images.shape == (1, 4, 384 // 8, 672 // 8)
    picture = pipe("a red circle", **{**asked, "output_type": "pil"}, num_inference_steps=1).images[0]
    assert picture.size == (178, 100)


def test_a_call_with_binning_gives_diffusers_latents(pipe, their_pipe, short, seeded):
    # diffusers goes by sample_size 32 alone, whatever the scale of the latents: it takes these 256 pixels for 1024.
    weights = their_pipe.transformer.state_dict()
    for pipeline, sample_size in [(their_pipe, 32), (pipe, 128)]:
        network = type(pipeline.transformer).from_config(pipeline.transformer.config, sample_size=sample_size)
        network.load_state_dict(weights)
        pipeline.transformer = network.eval()
    asked = {**short, "use_resolution_binning": True, "height": 178, "width": 100, "num_inference_steps": 1}
    ours = pipe("a red circle", **asked, generator=seeded(0)).images
    theirs = their_pipe("a red circle", **asked, intermediate_timesteps=None, generator=seeded(0)).images
    assert ours.shape == (1, 4, 1344 // 8, 768 // 8)
    assert_close(ours, theirs, atol=1e-4, rtol=0)  # linear attention sums 16128 tokens in float32
