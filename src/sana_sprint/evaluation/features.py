"""Pictures to features that the Fréchet distance compares: by an autoencoder, or by Inception.

B pictures, H W pixels, C latent channels, h w latent grid, D features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_sprint.autoencoder.model import AutoencoderDC

# Of torch-fidelity's Inception: the last pooling, which the Fréchet inception distance is defined on.
_POOLED = "2048"


def _channels_first(pictures: np.ndarray, device: str | torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2)  # B H W 3 -> B 3 H W


class AutoencoderFeatures:
    """Mean and standard deviation of each latent channel over the grid: D = 2 C.

    Where on the grid something lies is left out on purpose. All of the latents would be far more features than a few
    hundred pictures can tell apart. The means alone hardly see what is blurred, noisy or missing, which the deviations
    do; docs/evaluation.md has the numbers.

    Args:
        vae: Ours or diffusers'.
        device: Where it computes; where its weights are if None.
    """

    def __init__(self, vae: Any, device: str | torch.device | None = None) -> None:
        self.vae = vae
        self.device = vae.device if device is None else device

    @property
    def num_features(self) -> int:
        return 2 * self.vae.config.latent_channels

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8 to features (B, D).

        Raises:
            ValueError: if H or W is no multiple of the compression ratio.
        """
        pixels = (_channels_first(pictures, self.device).float() / 127.5 - 1).to(self.vae.dtype)
        latents = self.vae.encode(pixels, return_dict=False)[0].float() * self.vae.config.scaling_factor
        deviations, means = torch.std_mean(latents, dim=(2, 3), correction=0)  # B C h w -> B C
        return torch.cat([means, deviations], dim=1).cpu().numpy()


def load_autoencoder_features(folder: Path, device: str | torch.device = "cpu") -> AutoencoderFeatures:
    """The features of an autoencoder that lies in a folder of its own, or in a pipeline's.

    Raises OSError, as diffusers does, if there is none.
    """
    inside = {"subfolder": "vae"} if (folder / "model_index.json").is_file() else {}
    vae = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32, **inside)
    return AutoencoderFeatures(vae.eval().to(device))


class InceptionFeatures:
    """The features of the Fréchet inception distance, D = 2048, for pictures of any size: torch-fidelity's network.

    Its weights, 91 MB, are fetched by torch's hub at the first use unless a file is given.

    Args:
        device: Where it computes.
        weights: A file with the weights, as torch-fidelity publishes it.

    Raises:
        ImportError: if torch-fidelity is not installed.
    """

    def __init__(self, device: str | torch.device = "cpu", weights: Path | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "Inception features need torch-fidelity: pip install 'sana-sprint[evaluation]'"
            ) from error
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [_POOLED], feature_extractor_weights_path=weights and str(weights)
        )
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8 to features (B, 2048)."""
        (features,) = self.network(_channels_first(pictures, self.device))
        return features.cpu().numpy()
