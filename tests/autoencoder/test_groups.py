"""Groups of the autoencoder alone."""

from copy import deepcopy

import pytest
import torch


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@torch.no_grad()
def test_groups_of_the_autoencoder_are_fetched_strip_by_strip(tiny_pipeline_parts, tmp_path, offload_type):
    vae = deepcopy(tiny_pipeline_parts["vae"])
    vae.enable_strips(rows=16)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(pixels).latent
    expected = vae.decode(latent).sample
    torch.use_deterministic_algorithms(True)
    try:
        vae.enable_group_offload(
            torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
        )
        for _ in range(2):
            assert torch.equal(vae.encode(pixels).latent, latent)
            assert torch.equal(vae.decode(latent).sample, expected)
    finally:
        torch.use_deterministic_algorithms(False)
