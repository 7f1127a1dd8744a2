"""Pictures to a trained DC-AE: reconstruction with noisy, whitened latents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.training.data import PicturePool, to_tensor
from sana_sprint.training.draws import Draws
from sana_sprint.training.identity import network_digest
from sana_sprint.training.loop import Objective, train
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.training.settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The network, the losses' weights and the length of the stage."""

    config: dict[str, Any]
    loop: LoopSettings
    optimiser: OptimiserSettings
    square_weight: float = 0.5
    gradient_weight: float = 0.5
    # Standard deviation of the noise on unit-variance latents: the decoder learns to forgive the flow's errors.
    latent_noise: float = 0.1
    whiten_weight: float = 0.05
    # The second stage, on frozen latents: squares weigh the few pixels that are quite wrong, such as lost points.
    decoder_loop: LoopSettings
    decoder_optimiser: OptimiserSettings
    decoder_square_weight: float = 4.0
    # The third: another encoder for the same latents, by the entries of `config` that it changes.
    encoder_config: dict[str, Any]
    encoder_loop: LoopSettings
    encoder_optimiser: OptimiserSettings
    # Share of its examples that are drawings of the pictures' outlines, as a ControlNet is shown drawings.
    encoder_drawings: float = 0.25
    compile: bool = True


def gradient_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring pixels' differences: edges count, flat areas do not."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def whitening_loss(latents: torch.Tensor) -> torch.Tensor:
    """How far the channels of (B, C, H, W) are from mean 0 and standard deviation 1; a flow learns those best."""
    deviation, mean = torch.std_mean(latents.float(), dim=(0, 2, 3))
    return (mean.square() + (deviation - 1).square()).mean()


def outlines(pixels: torch.Tensor, least_difference: float = 0.5) -> torch.Tensor:
    """White lines on black of the size of pictures (B, 3, H, W) in [-1, 1]: where a pixel is unlike the next ones.

    Rougher than `conditioning.edges`, which needs OpenCV and takes one picture at a time.

    Args:
        pixels: the pictures.
        least_difference: of a channel, to the pixel on the right or the one below.
    """
    right = F.pad(pixels.diff(dim=-1).abs().amax(dim=1, keepdim=True), (0, 1))
    below = F.pad(pixels.diff(dim=-2).abs().amax(dim=1, keepdim=True), (0, 0, 0, 1))
    is_line = torch.maximum(right, below) >= least_difference
    return torch.where(is_line, 1.0, -1.0).to(pixels.dtype).expand_as(pixels)


def reconstruction_losses(
    vae: AutoencoderDC,
    latents: torch.Tensor,
    pixels: torch.Tensor,
    draws: Draws,
    settings: AutoencoderSettings,
    square_weight: float,
) -> dict[str, torch.Tensor]:
    """Losses of decoding latents (B, C, h, w), made noisy, to the pictures (B, 3, H, W) in [-1, 1] they stand for."""
    noise = draws.normal(latents.shape[1:]).to(latents.dtype)
    decoded = vae.decode(latents + settings.latent_noise * noise, return_dict=False)[0].float()
    absolute, square = F.l1_loss(decoded, pixels), F.mse_loss(decoded, pixels)
    edges = gradient_difference(decoded, pixels)
    loss = absolute + square_weight * square + settings.gradient_weight * edges
    return {"loss": loss, "absolute": absolute, "square": square, "edges": edges}


class AutoencoderObjective(Objective[AutoencoderDC]):
    """Encoder and decoder: what was encoded is decoded, and the latents are white."""

    def __init__(self, vae: AutoencoderDC, pool: PicturePool, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.vae = vae
        self.pool = pool
        self.settings = settings

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        pixels = self.pool.batch(draws)
        latents = self.vae.encode(pixels, return_dict=False)[0]
        parts = reconstruction_losses(self.vae, latents, pixels, draws, self.settings, self.settings.square_weight)
        whiteness = whitening_loss(latents)
        return {**parts, "loss": parts["loss"] + self.settings.whiten_weight * whiteness, "whiteness": whiteness}

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("autoencoder", trainable(self.vae), self.settings.optimiser)]

    def averaged(self) -> AutoencoderDC:
        return self.vae


class DecoderObjective(Objective[AutoencoderDC]):
    """The decoder alone, on the latents of an encoder that stays as it is."""

    def __init__(self, vae: AutoencoderDC, pool: PicturePool, settings: AutoencoderSettings) -> None:
        super().__init__()
        vae.encoder.requires_grad_(False)
        self.vae = vae
        self.pool = pool
        self.settings = settings

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        pixels = self.pool.batch(draws)
        with torch.no_grad():
            latents = self.vae.encode(pixels, return_dict=False)[0]
        return reconstruction_losses(
            self.vae, latents, pixels, draws, self.settings, self.settings.decoder_square_weight
        )

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("decoder", trainable(self.vae), self.settings.decoder_optimiser)]

    def averaged(self) -> AutoencoderDC:
        return self.vae


class EncoderObjective(Objective[AutoencoderDC]):
    """Another encoder, by the squared error of its latents to those of the one that the flow has learned from."""

    def __init__(
        self, vae: AutoencoderDC, original: AutoencoderDC, pool: PicturePool, settings: AutoencoderSettings
    ) -> None:
        super().__init__()
        vae.decoder.requires_grad_(False)
        self.vae = vae
        self.original = original.eval().requires_grad_(False)
        self.pool = pool
        self.settings = settings

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        pixels = self.pool.batch(draws)
        is_drawing = draws.uniform() < self.settings.encoder_drawings
        pixels = torch.where(is_drawing.view(-1, 1, 1, 1), outlines(pixels), pixels)
        with torch.no_grad():
            goal = self.original.encode(pixels, return_dict=False)[0]
        return {"loss": F.mse_loss(self.vae.encode(pixels, return_dict=False)[0].float(), goal.float())}

    def own_settings(self) -> dict[str, Any]:
        settings = self.settings
        entries = {name: str(value) for name, value in settings.encoder_config.items()}
        return {"encoder_drawings": settings.encoder_drawings, **entries}

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("encoder", trainable(self.vae), self.settings.encoder_optimiser)]

    def averaged(self) -> AutoencoderDC:
        return self.vae


@torch.no_grad()
def encode_pictures(vae: AutoencoderDC, pictures: np.ndarray, batch_size: int = 256) -> torch.Tensor:
    """Unscaled latents (M, C, h, w) float32 of pictures (M, H, W, 3) uint8."""
    starts = tqdm(
        range(0, len(pictures), batch_size), desc="encoding pictures", unit="batch", dynamic_ncols=True, disable=None
    )
    batches = (to_tensor(pictures[start : start + batch_size]).to(vae.device) for start in starts)
    return torch.cat([vae.encode(batch, return_dict=False)[0].cpu() for batch in batches]).contiguous()


@torch.no_grad()
def peak_signal_to_noise(vae: AutoencoderDC, pictures: np.ndarray) -> float:
    """Mean PSNR in decibels of pictures encoded and decoded without noise."""
    pixels = to_tensor(pictures)
    decoded = vae(pixels, return_dict=False)[0].clamp(-1, 1)
    error = (decoded - pixels).square().mean(dim=(1, 2, 3)) / 4  # of a peak of 1
    return float((-10 * error.log10()).mean())


def train_autoencoder(
    pool: PicturePool, settings: AutoencoderSettings, folder: Path, device: torch.device
) -> AutoencoderDC:
    """Train a DC-AE on a pool of pictures; its `scaling_factor` makes the latents of the pool unit variance."""
    torch.manual_seed(settings.loop.seed)
    vae = _prepared(AutoencoderDC(**settings.config), settings)
    average = train(AutoencoderObjective(vae, pool, settings), settings.loop, folder, "autoencoder", device)
    deviation = encode_pictures(average, pool.pictures[:4096]).std().item()
    average.register_to_config(scaling_factor=round(1 / deviation, 5))
    return average


def refine_decoder(
    vae: AutoencoderDC, pool: PicturePool, settings: AutoencoderSettings, folder: Path, device: torch.device
) -> AutoencoderDC:
    """Train the decoder further, on the latents as they are: a flow that learned them stays valid."""
    objective = DecoderObjective(_prepared(vae, settings), pool, settings)
    return train(objective, settings.decoder_loop, folder, "decoder", device).requires_grad_(True)


def with_new_encoder(vae: AutoencoderDC, settings: AutoencoderSettings) -> AutoencoderDC:
    """The same decoder, behind an encoder of its own config that knows nothing yet."""
    new = AutoencoderDC.from_config(vae.config, **settings.encoder_config)
    new.decoder.load_state_dict(vae.decoder.state_dict())
    return new


def distil_encoder(
    vae: AutoencoderDC, pool: PicturePool, settings: AutoencoderSettings, folder: Path, device: torch.device
) -> AutoencoderDC:
    """Train a smaller encoder to the same latents, for what edits pictures and reads drawings.

    The flow has learned those of the large one.
    """
    torch.manual_seed(settings.encoder_loop.seed)
    began_with = {"autoencoder": network_digest(vae)}
    new = _prepared(with_new_encoder(vae, settings), settings)
    objective = EncoderObjective(new, _prepared(vae, settings), pool, settings)
    average = train(objective, settings.encoder_loop, folder, "encoder", device, sources=began_with)
    return average.requires_grad_(True)


def _prepared(vae: AutoencoderDC, settings: AutoencoderSettings) -> AutoencoderDC:
    """The same network, laid out and compiled for training."""
    vae.to(memory_format=torch.channels_last)
    if settings.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    return vae
