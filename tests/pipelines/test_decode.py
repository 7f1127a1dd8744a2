"""Too little memory to decode or encode: in tiles, said once, and nothing left changed; or an error that says why."""

import logging
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from sana_sprint import SanaSprintImg2ImgPipeline

CIRCLE = "a red circle"


@pytest.fixture
def scarce(pipe):
    """Makes the decoder run out of memory on more than a number of latent cells, and counts what it was given."""
    pipe.vae = deepcopy(pipe.vae)
    pipe.vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    pipe.vae.disable_tiling()
    inputs = []

    def limit(cells: int) -> list[tuple[int, ...]]:
        def refuse(_module, arguments):
            shape = tuple(arguments[0].shape)
            inputs.append(shape)
            if shape[0] * shape[2] * shape[3] > cells:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

        pipe.vae.decoder.register_forward_pre_hook(refuse)
        pipe.vae.encoder.register_forward_pre_hook(refuse)
        return inputs

    return limit


# 5, B3
def test_a_decode_out_of_memory_is_done_in_tiles_and_says_so_once(pipe, scarce, short, seeded, caplog):
    asked = {**short, "height": 128, "width": 128, "output_type": "pt"}
    inputs = scarce(64)
    with caplog.at_level(logging.WARNING):
        images = pipe([CIRCLE] * 2, **asked, generator=seeded([0, 1])).images
        pipe([CIRCLE] * 2, **asked, generator=seeded([0, 1]))
    assert images.shape == (2, 3, 128, 128)
    assert inputs[0] == (2, 4, 16, 16)
    assert max(rows * columns for _, _, rows, columns in inputs[1:9]) <= 64
    assert len(caplog.records) == 1
    assert "enable_vae_tiling()" in caplog.text


def test_a_decode_in_tiles_for_lack_of_memory_is_the_tiled_decode(pipe, scarce, short, seeded):
    asked = {**short, "height": 128, "width": 128, "output_type": "pt"}
    pipe.enable_vae_tiling()
    tiled = pipe(CIRCLE, **asked, generator=seeded(0)).images
    pipe.disable_vae_tiling()
    scarce(64)
    assert_close(pipe(CIRCLE, **asked, generator=seeded(0)).images, tiled, atol=0, rtol=0)


def test_the_autoencoder_is_left_as_it_was(pipe, scarce, short):
    scarce(64)
    before = {name: value for name, value in vars(pipe.vae).items() if name.startswith(("use_", "tile_"))}
    pipe(CIRCLE, **{**short, "height": 128, "width": 128, "output_type": "pt"})
    assert {name: value for name, value in vars(pipe.vae).items() if name.startswith(("use_", "tile_"))} == before
    assert not pipe.vae.use_tiling


def test_too_little_memory_for_a_tile_is_an_error_that_says_what_to_do(pipe, scarce, short):
    scarce(16)
    with pytest.raises(torch.OutOfMemoryError, match="tile_sample_min_height=256") as failure:
        pipe(CIRCLE, **{**short, "height": 128, "width": 128, "output_type": "pt"})
    assert "64x64 pixels" in str(failure.value)
    assert "Tried to allocate 9.00 GiB" in str(failure.value.__cause__)
    assert not pipe.vae.use_tiling


def test_an_encode_out_of_memory_is_done_in_tiles_too(pipe, scarce, caplog):
    image = SanaSprintImg2ImgPipeline.from_pipe(pipe)
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    image.enable_vae_tiling()
    tiled = image.encode_image(pictures, 128, 128)
    image.disable_vae_tiling()
    inputs = scarce(64 * 64)
    with caplog.at_level(logging.WARNING):
        assert_close(
            image.encode_image(pictures, 128, 128), tiled, atol=1e-4, rtol=0
        )  # one by one, float32, thousands of sums
    assert inputs[0] == (2, 3, 128, 128)
    assert not image.vae.use_tiling
    assert "not enough memory to encode a batch of 2x3x128x128" in caplog.text
    scarce(16)
    with pytest.raises(torch.OutOfMemoryError, match="pass the latents as image"):
        image.encode_image(pictures, 128, 128)


def test_enough_memory_decodes_at_once(pipe, scarce, short, caplog):
    inputs = scarce(10**6)
    pipe([CIRCLE] * 2, **{**short, "height": 128, "width": 128, "output_type": "pt"})
    assert inputs == [(2, 4, 16, 16)]
    assert not caplog.records


def test_slicing_and_tiling_are_switched_for_the_autoencoder(pipe):
    pipe.vae = deepcopy(pipe.vae)
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (True, True)
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (False, False)
