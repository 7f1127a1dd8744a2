"""Latents, clean or made up, to logits that tell which: the discriminator of latent adversarial distillation (LADD).

Sauer et al., "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation" (2024): small heads,
those of StyleGAN-T (Sauer et al., 2023), on what the blocks of a frozen diffusion transformer make of noised latents.

B batch, C channels, h w latent grid, N = h*w tokens, D width, L text tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.residuals import ControlSamples, residuals_by_block

# At most so many examples share the statistics of a batch norm, however large the batch.
_VIRTUAL_BATCH = 8


class LocalBatchNorm(nn.Module):
    """Batch norm of (B, D, h, w) over groups of a few examples, without running statistics (StyleGAN-T)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = next(size for size in range(_VIRTUAL_BATCH, 0, -1) if x.shape[0] % size == 0)
        grouped = x.float().unflatten(0, (-1, group))  # G g D h w
        variance, mean = torch.var_mean(grouped, dim=(1, 3, 4), correction=0, keepdim=True)
        normalised = ((grouped - mean) * torch.rsqrt(variance + self.eps)).flatten(0, 1)
        return (normalised * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class DiscriminatorHead(nn.Module):
    """The features of one block (B, D, h, w) to one logit per token (B, N).

    The published heads convolve nine tokens in a row along the raster; these, the 3x3 around each, of as many weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Sequential(spectral_norm(nn.Conv2d(width, width, 1)), LocalBatchNorm(width))
        self.around = nn.Sequential(spectral_norm(nn.Conv2d(width, width, 3, padding=1)), LocalBatchNorm(width))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.into(features), 0.2)
        x = (x + F.leaky_relu(self.around(x), 0.2)) * 0.5**0.5
        return self.out(x).flatten(1)


class Discriminator(nn.Module):
    """Heads on the features of some of a frozen transformer's blocks."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(DiscriminatorHead(width) for _ in range(num_blocks))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features (B, D, h, w), one tensor per head, to the logits of all heads (B, heads * N)."""
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1)


def block_features(
    transformer: SanaTransformer2DModel,
    blocks: Sequence[int],
    latents: torch.Tensor,
    time: torch.Tensor,
    caption: torch.Tensor,
    mask: torch.Tensor,
    guidance: torch.Tensor | None,
    residuals: ControlSamples = (),
) -> list[torch.Tensor]:
    """What the blocks of these numbers, ascending from 0, return: (B, D, h, w) each. Later blocks are not run.

    Arguments are those of the transformer's `forward`; `residuals` are a ControlNet's, and the features are with them.
    """
    inputs = transformer.embed_inputs(latents, caption, time, guidance, mask)
    tokens, features = inputs.tokens, []
    by_block = residuals_by_block(residuals)
    for index, block in enumerate(transformer.transformer_blocks[: blocks[-1] + 1]):
        tokens = transformer.run_block(block, tokens, inputs)
        if index in by_block:
            tokens = tokens + by_block[index]
        if index in blocks:
            features.append(tokens.unflatten(1, (inputs.height, inputs.width)).movedim(3, 1))
    return features


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of logits of any shape: real ones shall exceed 1, those of fakes fall below -1 (Lim and Ye, 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """What makes fakes look real under the hinge loss."""
    return -fake.mean()


def gradient_penalty(real: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """R1 (Mescheder et al., 2018): squared gradient of an example's mean logit by the inputs (B, ...), their mean."""
    gradients = torch.autograd.grad(real.mean(1).sum(), list(inputs), create_graph=True)
    return sum(gradient.float().flatten(1).square().sum(1) for gradient in gradients).mean()  # type: ignore[union-attr]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module, and none is kept for its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
