"""A model drawing held-out captions, as the commands that score it have it draw."""

import argparse

import numpy as np
import torch

from sana_sprint.cli import held_out


def test_a_picture_is_that_of_its_caption_and_seed_whatever_the_batch(model_folder):
    """Thirty captions are two batches."""
    parser = argparse.ArgumentParser()
    held_out.add_arguments(parser, num_captions=500)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(["--model", model_folder, "--num-captions", "30", "--seed", "7"])
    held_out.fill_in(options, **held_out.DEFAULTS, num_captions=500)
    assert (options.num_captions, options.seed, options.guidance) == (30, 7, 4.5)
    artist = held_out.open_artist(options)
    pictures = artist.draw("drawing", num_inference_steps=1)
    assert len(pictures) == 30
    for index in (0, 24, 25, 29):
        (alone,) = artist.pipe(
            artist.held_out.captions[index],
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(7 + index),
            output_type="np",
        ).images
        # Rounded to whole steps of 255 after sums that another batch may take in another order.
        assert np.abs(pictures[index] - 255 * alone).max() < 1.5
    assert np.abs(pictures[0].astype(int) - pictures[25]).max() > 10
