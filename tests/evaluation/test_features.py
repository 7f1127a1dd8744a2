"""What an autoencoder's features are, whatever its precision and wherever it lies; Inception where it is missing."""

import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sana_sprint import AutoencoderDC, SanaSprintPipeline
from sana_sprint.evaluation.features import AutoencoderFeatures, InceptionFeatures, load_autoencoder_features

PICTURES = np.random.default_rng(0).integers(0, 256, size=(3, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vae(tiny_pipeline_parts) -> AutoencoderDC:
    return tiny_pipeline_parts["vae"]


def test_features_are_means_and_deviations_of_the_latents_that_the_transformer_sees(vae):
    pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent * vae.config.scaling_factor  # 3 4 4 6
    expected = torch.cat([latents.mean((2, 3)), latents.std((2, 3), correction=0)], dim=1)
    network = AutoencoderFeatures(vae)
    features = torch.from_numpy(network(PICTURES))
    assert features.shape == (3, network.num_features)
    assert_close(features, expected, atol=1e-5, rtol=0)  # float32, latents of unit scale


def test_features_do_not_depend_on_the_batch(vae):
    network = AutoencoderFeatures(vae)
    together, alone = network(PICTURES), np.concatenate([network(PICTURES[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_autoencoder_in_half_precision_gives_nearly_the_same_features(vae):
    half = AutoencoderDC.from_config(vae.config)
    half.load_state_dict(vae.state_dict())
    features = AutoencoderFeatures(half.to(torch.bfloat16))(PICTURES)
    assert features.dtype == np.float32
    # bfloat16 has 8 bits: 0.4 % of latents of unit scale at each of a dozen layers.
    np.testing.assert_allclose(features, AutoencoderFeatures(vae)(PICTURES), atol=0.05)


def test_an_autoencoder_is_found_in_its_own_folder_and_in_a_pipelines(tiny_pipeline_parts, vae, tmp_path):
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(tmp_path / "pipeline")
    expected = AutoencoderFeatures(vae)(PICTURES)
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        np.testing.assert_allclose(load_autoencoder_features(folder)(PICTURES), expected, atol=1e-6)


def test_pictures_that_the_autoencoder_cannot_take_are_refused(vae):
    with pytest.raises(ValueError, match="multiples of 8, got 32x44"):
        AutoencoderFeatures(vae)(PICTURES[:, :, :44])


def test_without_torch_fidelity_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"torch-fidelity: pip install 'sana-sprint\[evaluation\]'"):
        InceptionFeatures()
