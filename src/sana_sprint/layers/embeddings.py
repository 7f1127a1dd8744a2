"""Latents, times, guidance and captions to the vectors that the transformer's blocks work on.

B batch, C channels, H W grid, N = H*W tokens, D width, L text tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Width of the sinusoidal features in front of the time and guidance MLPs (fixed in every published checkpoint).
NUM_TIME_FEATURES = 256


def sinusoidal_features(positions: torch.Tensor, num_features: int, cosine_first: bool) -> torch.Tensor:
    """Sines and cosines of `positions` (M,) at geometric frequencies 10000^(-k / (num_features / 2)): (M, features).

    (Vaswani et al., 2017.) Computed in the dtype of `positions`.
    """
    half = num_features // 2
    exponents = torch.arange(half, device=positions.device, dtype=positions.dtype) / half
    angles = positions[:, None] * torch.exp(-math.log(10000) * exponents)
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


def sincos_positions(
    height: int, width: int, dim: int, base_size: int, interpolation_scale: float, device: torch.device | None = None
) -> torch.Tensor:
    """Two-dimensional positional embedding (1, height * width, dim), float32; first half columns, second half rows.

    Coordinates are stretched so that a grid of `base_size` cells has spacing 1 / `interpolation_scale`.
    """

    def along(size: int) -> torch.Tensor:
        cells = torch.arange(size, device=device, dtype=torch.float32) / (size / base_size) / interpolation_scale
        # MPS has no float64; elsewhere the sines of large positions deserve it.
        cells = cells if cells.device.type == "mps" else cells.double()
        return sinusoidal_features(cells, dim // 2, cosine_first=False).float()

    rows, columns = along(height), along(width)
    grid = torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)  # H W D
    return grid.reshape(1, height * width, dim)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) to tokens (B, N, D): one strided convolution, plus positions if they are asked for."""

    pos_embed: torch.Tensor | None

    def __init__(
        self, sample_size: int, patch_size: int, in_channels: int, dim: int, interpolation_scale: float | None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.base_size = sample_size // patch_size
        self.interpolation_scale = interpolation_scale
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        positions = None
        if interpolation_scale is not None:
            positions = sincos_positions(self.base_size, self.base_size, dim, self.base_size, interpolation_scale)
        self.register_buffer("pos_embed", positions, persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        grid = self.proj(latents.contiguous(memory_format=torch.channels_last))
        height, width = grid.shape[-2:]
        tokens = grid.permute(0, 2, 3, 1).flatten(1, 2)  # B D H W -> B N D
        if self.pos_embed is None or self.interpolation_scale is None:
            return tokens
        positions = self.pos_embed
        if (height, width) != (self.base_size, self.base_size):
            positions = sincos_positions(
                height, width, tokens.shape[-1], self.base_size, self.interpolation_scale, tokens.device
            )
        return (tokens + positions).to(tokens.dtype)


class ScalarEmbedder(nn.Module):
    """Sinusoidal features of one number per image, through an MLP: (B, 256) to (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(NUM_TIME_FEATURES, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Frequencies times values need float32: bfloat16 cannot tell neighbouring times apart.
        features = sinusoidal_features(values.float(), NUM_TIME_FEATURES, cosine_first=True)
        return self.linear_2(F.silu(self.linear_1(features.to(dtype))))


class TimeEmbedding(nn.Module):
    """Time to the modulation of all blocks (B, 6 D) and to the embedding that the last norm uses (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # One level deeper than with guidance: the published keys of flow checkpoints are time_embed.emb.….
        self.emb = nn.ModuleDict({"timestep_embedder": ScalarEmbedder(dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(
        self, time: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if guidance is not None:
            raise ValueError("this network has no guidance embedding (guidance_embeds=False): guidance must be None")
        embedding = self.emb["timestep_embedder"](time, dtype)
        return self.linear(F.silu(embedding)), embedding


class TimeGuidanceEmbedding(nn.Module):
    """Time and guidance to modulation (B, 6 D) and embedding (B, D): the two embeddings are added (SANA-Sprint)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = ScalarEmbedder(dim)
        self.guidance_embedder = ScalarEmbedder(dim)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(
        self, time: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if guidance is None:
            raise ValueError(
                "this network embeds its guidance (guidance_embeds=True): pass guidance, one number per image,"
                " the guidance scale times guidance_embeds_scale"
            )
        embedding = self.timestep_embedder(time, dtype) + self.guidance_embedder(guidance, dtype)
        return self.linear(F.silu(embedding)), embedding


class CaptionProjection(nn.Module):
    """Text features (B, L, caption channels) to the transformer's width (B, L, D)."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, caption: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))
