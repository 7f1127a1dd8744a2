"""Pixels to latents and back: AutoencoderDC, the deep-compression autoencoder of SANA.

B batch, C latent channels, H W pixels, r compression ratio.
"""

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from sana_sprint.autoencoder.coder import Decoder, Encoder, Stage, per_stage
from sana_sprint.autoencoder.tiling import apply_tiled
from sana_sprint.layers.casting import QuietCastMixin
from sana_sprint.plugin import QuantisedModel, SingleFileModel

# Of a tile's length; the rest overlaps the next tile. Upstream's 448 of 512.
STRIDE_SHARE = Fraction(7, 8)

# Rows of a strip: halos add 2.4 % to the operations of SANA's decoder at 1024 pixels (4.8 % at 32 rows, 1.4 % at 128).
STRIP_ROWS = 64


def _stages(
    channels: tuple[int, ...],
    layers: tuple[int, ...],
    block_types: str | tuple[str, ...],
    kernel_sizes: tuple[tuple[int, ...], ...],
    norm_types: str | tuple[str, ...],
    act_fns: str | tuple[str, ...],
) -> list[Stage]:
    named = (block_types, norm_types, act_fns)
    lengths = {len(layers), len(kernel_sizes), *(len(value) for value in named if not isinstance(value, str))}
    if len(channels) < 2 or lengths != {len(channels)}:
        raise ValueError(
            f"a config needs one width, layer count and kernel list per stage, and at least two stages: got"
            f" {len(channels)} widths beside lists of {sorted(lengths)}"
        )
    columns = (per_stage(value, len(channels)) for value in named)
    return [
        Stage(
            channels=width, num_layers=count, kernel_sizes=tuple(kernels), block_type=block, norm_type=norm, act_fn=act
        )
        for width, count, kernels, block, norm, act in zip(channels, layers, kernel_sizes, *columns, strict=True)
    ]


class AutoencoderDC(
    QuantisedModel, QuietCastMixin, AutoencoderMixin, ConfigMixin, SingleFileModel, FromOriginalModelMixin
):
    """The deep-compression autoencoder DC-AE (arXiv 2410.10733), as used by SANA (arXiv 2410.10629).

    Config, state-dict keys and shapes are those of diffusers' class of the same name, so folders are exchangeable.

    Args:
        in_channels: of the pictures.
        latent_channels: of the latents.
        attention_head_dim: of the linear attention in EfficientViT blocks.
        encoder_block_types, decoder_block_types: "ResBlock" or "EfficientViTBlock", one or one per stage.
        encoder_block_out_channels, decoder_block_out_channels: width per stage, full resolution first; the number of
            stages fixes the compression ratio r = 2^(stages - 1).
        encoder_layers_per_block, decoder_layers_per_block: blocks per stage; 0 first drops the full resolution.
        encoder_qkv_multiscales, decoder_qkv_multiscales: kernel sizes of the extra attention heads, per stage.
        upsample_block_type: "interpolate", or anything else for convolution and pixel shuffle.
        downsample_block_type: "pixel_unshuffle", or anything else for a strided convolution ("Conv" in published
            configs).
        decoder_norm_types: "rms_norm" or "batch_norm", one or one per stage; the encoder always has "rms_norm".
        decoder_act_fns: activation, one or one per stage; the encoder always has "silu".
        encoder_out_shortcut, decoder_in_shortcut: averaging and repeating shortcuts at the latent.
        decoder_conv_act_fn: activation before the last convolution.
        scaling_factor: latents times this have unit variance; applied by pipelines, not here.

    Raises:
        ValueError: for an unknown block, norm or activation, or lists that differ in length.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "EfficientViTBlock", "DCDownBlock2d", "DCUpBlock2d"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: str | tuple[str, ...] = "ResBlock",
        decoder_block_types: str | tuple[str, ...] = "ResBlock",
        encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: str | tuple[str, ...] = "rms_norm",
        decoder_act_fns: str | tuple[str, ...] = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            _stages(
                encoder_block_out_channels,
                encoder_layers_per_block,
                encoder_block_types,
                encoder_qkv_multiscales,
                "rms_norm",
                "silu",
            ),
            head_dim=attention_head_dim,
            unshuffle=downsample_block_type == "pixel_unshuffle",
            out_shortcut=encoder_out_shortcut,
        )
        self.decoder = Decoder(
            in_channels,
            latent_channels,
            _stages(
                decoder_block_out_channels,
                decoder_layers_per_block,
                decoder_block_types,
                decoder_qkv_multiscales,
                decoder_norm_types,
                decoder_act_fns,
            ),
            head_dim=attention_head_dim,
            interpolate=upsample_block_type == "interpolate",
            in_shortcut=decoder_in_shortcut,
            act_fn=decoder_conv_act_fn,
        )
        self.spatial_compression_ratio = 2 ** (len(encoder_block_out_channels) - 1)
        self.temporal_compression_ratio = 1  # diffusers contract
        self.use_slicing = False
        self.use_tiling = False
        self.use_strips = True
        self.strip_rows = STRIP_ROWS
        self.tile_sample_min_height = 512
        self.tile_sample_min_width = 512
        # 448 for every published model but f128, of whose 128 pixels per latent it is no multiple.
        self.tile_sample_stride_height = self._stride_of(512)
        self.tile_sample_stride_width = self._stride_of(512)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Encode and decode images larger than a tile in overlapping tiles, blended: less memory, nearly the same.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile in pixels, a multiple of the compression
                ratio; None keeps the present size (512).
            tile_sample_stride_height, tile_sample_stride_width: the most that neighbouring tiles are apart, in
                pixels, a multiple of the compression ratio, at most the tile; None keeps the present stride, or takes
                7/8 of the tile when a tile size is given.

        Raises:
            ValueError: for a tile or stride that is no multiple of the ratio, or a stride beyond its tile.
        """
        height = self._tile_axis("height", tile_sample_min_height, tile_sample_stride_height)
        width = self._tile_axis("width", tile_sample_min_width, tile_sample_stride_width)
        self.tile_sample_min_height, self.tile_sample_stride_height = height
        self.tile_sample_min_width, self.tile_sample_stride_width = width
        self.use_tiling = True

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Move weights to where they compute in groups, as diffusers does; each layer is a group, whatever is asked.

        diffusers' blocks are fetched when `forward` runs, of the autoencoder or of a block. `encode`, `decode` and
        strips run the layers themselves.
        """
        bound = inspect.signature(super().enable_group_offload).bind(*args, **kwargs)
        super().enable_group_offload(**{**bound.arguments, "offload_type": "leaf_level"})

    def enable_strips(self, rows: int | None = None) -> None:
        """Encode and decode pictures strip by strip where the network is local: less memory, the same result.

        On from the start. What is not local, the attention of EfficientViT blocks, sees the whole picture, or the
        whole tile where tiling is enabled. Has no effect where gradients are asked for or a graph is compiled.

        Args:
            rows: of a strip, at every resolution; None keeps the present number (64).

        Raises:
            ValueError: if `rows` is not a whole number from 1 on.
        """
        self.strip_rows = self._checked_rows(self.strip_rows if rows is None else rows)
        self.use_strips = True

    def disable_strips(self) -> None:
        """Encode and decode pictures, or tiles, in one piece."""
        self.use_strips = False

    @staticmethod
    def _checked_rows(rows: int) -> int:
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"a strip must have a whole number of rows, at least 1, got {rows!r}")
        return rows

    def _stride_of(self, tile: float) -> int:
        """`STRIDE_SHARE` of a tile in pixels, in whole latent cells, at least one."""
        ratio = self.spatial_compression_ratio
        return max(int(tile * STRIDE_SHARE) // ratio, 1) * ratio

    def _tile_axis(self, axis: str, tile: float | None, stride: float | None) -> tuple[int, int]:
        """Tile and stride along one axis, in pixels; None is filled in, and what cannot work is refused."""
        ratio = self.spatial_compression_ratio
        if stride is None and tile is None:
            stride = getattr(self, f"tile_sample_stride_{axis}")
        tile = getattr(self, f"tile_sample_min_{axis}") if tile is None else tile
        if stride is None:
            stride = self._stride_of(tile)
        for name, value in (("tile", tile), ("stride", stride)):
            if value < ratio or value % ratio:
                raise ValueError(f"{name} {axis} must be a positive multiple of {ratio} pixels, got {value}")
        if stride > tile:
            raise ValueError(f"stride {axis} must be at most the tile {axis} {tile}, got {stride}")
        return int(tile), int(stride)

    @property
    def tile_latent_min_height(self) -> int:
        """Height of a tile in latent cells."""
        return self.tile_sample_min_height // self.spatial_compression_ratio

    @property
    def tile_latent_min_width(self) -> int:
        """Width of a tile in latent cells."""
        return self.tile_sample_min_width // self.spatial_compression_ratio

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[torch.Tensor]:
        """Pictures (B, in_channels, H, W) in [-1, 1] to latents (B, C, H / r, W / r), not yet scaled.

        Raises:
            ValueError: if H or W is no multiple of the compression ratio r.
        """
        height, width = self._picture_size(x)
        is_large = height > self.tile_sample_min_height or width > self.tile_sample_min_width
        latent = self._by_slices(x, self._tiled_encode if self.use_tiling and is_large else self._encode_piece)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents (B, C, h, w), already divided by the scaling factor, to pictures (B, in_channels, r h, r w)."""
        is_large = z.shape[-2] > self.tile_latent_min_height or z.shape[-1] > self.tile_latent_min_width
        sample = self._by_slices(z, self._tiled_decode if self.use_tiling and is_large else self._decode_piece)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _picture_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width of pictures, checked to be whole latent cells."""
        ratio = self.spatial_compression_ratio
        height, width = x.shape[-2:]
        if height % ratio or width % ratio:
            raise ValueError(f"picture height and width must be multiples of {ratio}, got {height}x{width}")
        return height, width

    def _by_slices(self, x: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([network(part) for part in x.split(1)])
        return network(x)

    def _encode_piece(self, x: torch.Tensor) -> torch.Tensor:
        """Latents of a picture or a tile, in strips unless it has no more rows than one."""
        return self.encoder(x, self._strip_rows_for(x.shape[-2]))

    def _decode_piece(self, z: torch.Tensor) -> torch.Tensor:
        """A picture or a tile, in strips unless it has no more rows than one."""
        return self.decoder(z, self._strip_rows_for(z.shape[-2] * self.spatial_compression_ratio))

    def _strip_rows_for(self, height: int) -> int | None:
        # Checked again at use: the attribute is public and may have been assigned.
        return self.strip_rows if self.use_strips and height > self._checked_rows(self.strip_rows) else None

    def _tiled_encode(self, x: torch.Tensor) -> torch.Tensor:
        (tile_height, stride_height), (tile_width, stride_width) = self._tiles()
        scale = Fraction(1, self.spatial_compression_ratio)
        return apply_tiled(self._encode_piece, x, (tile_height, tile_width), (stride_height, stride_width), scale)

    def _tiled_decode(self, z: torch.Tensor) -> torch.Tensor:
        ratio = self.spatial_compression_ratio
        (tile_height, stride_height), (tile_width, stride_width) = self._tiles()
        tile = (tile_height // ratio, tile_width // ratio)
        stride = (stride_height // ratio, stride_width // ratio)
        return apply_tiled(self._decode_piece, z, tile, stride, Fraction(ratio))

    def _tiles(self) -> tuple[tuple[int, int], tuple[int, int]]:
        # Checked again at use: the attributes are public and may have been assigned.
        return (
            self._tile_axis("height", self.tile_sample_min_height, self.tile_sample_stride_height),
            self._tile_axis("width", self.tile_sample_min_width, self.tile_sample_stride_width),
        )

    def tiled_encode(self, x: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[torch.Tensor]:
        """`encode` in tiles, whether or not tiling is enabled."""
        self._picture_size(x)
        latent = self._tiled_encode(x)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def tiled_decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """`decode` in tiles, whether or not tiling is enabled."""
        sample = self._tiled_decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode pictures (B, in_channels, H, W)."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)
