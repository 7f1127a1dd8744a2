"""Configs and a workload to bytes: what the weights of each network take, and what running it takes on top.

The networks are built on the meta device and run there, with every tensor counted and none held: seconds for the
largest, and no weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, PreTrainedModel

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.memory.configs import PipelineConfigs, controlnet_class
from sana_sprint.memory.tracker import PeakBytes
from sana_sprint.pipelines.controlled import check_fits
from sana_sprint.quantisation.layers import quantisable_layers
from sana_sprint.quantisation.quantisers import is_exact
from sana_sprint.text.prefix import Prefix, read_behind, read_prefix
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.transformer.multi_control import SanaMultiControlNetModel
from sana_sprint.transformer.residuals import ControlSamples

# At least the tokens of SANA's instruction under Gemma's tokenizer, which are read before every prompt.
INSTRUCTION_TOKENS = 250

# bitsandbytes: a float32 scale per row of int8, and one per 64 weights of nf4 or fp4.
_SCALE_BYTES, _WEIGHTS_PER_SCALE = 4, 64
# Under group offload: the block that computes, and the next one, which is on its way.
_BLOCKS_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call: pixels, pictures, whether they start from others, and the dtype of what is not quantised."""

    height: int = 1024
    width: int = 1024
    batch_size: int = 1
    max_sequence_length: int = 300
    starts_from_picture: bool = False
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of_call(
        cls,
        configs: PipelineConfigs,
        height: int | None = None,
        width: int | None = None,
        use_resolution_binning: bool = True,
        **others: Any,
    ) -> "Workload":
        """That of a pipeline's call, whose pictures are drawn in the nearest size that the model was trained on.

        Raises:
            ValueError: as the call does, for a size that cannot be drawn.
        """
        canvas = configs.canvas(height, width, use_resolution_binning)
        return cls(height=canvas.height, width=canvas.width, **others)


class _FusedAttention(TorchFunctionMode):
    """Inside, attention holds its result and no scores, as the kernels do that run on real devices."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        call = self._attend if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))

    @staticmethod
    def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class Counted(NamedTuple):
    """Bytes of tensors: the most at once, and those that are held as long as the result is."""

    peak: int
    result: int


@torch.no_grad()
def count(run: Callable[[], object]) -> Counted:
    """What running a network takes, with attention as fused kernels compute it."""
    with _FusedAttention(), PeakBytes() as bytes_made:
        result = run()
    held = bytes_made.held
    del result
    return Counted(bytes_made.peak, held)


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks of a pipeline, without their weights. Sizes between the latents' cells are rounded up."""

    configs: PipelineConfigs
    workload: Workload

    @cached_property
    def text_encoder(self) -> PreTrainedModel:
        return self._empty_network(lambda: AutoModel.from_config(self.configs.text_encoder))

    @cached_property
    def transformer(self) -> SanaTransformer2DModel:
        return self._empty_network(lambda: SanaTransformer2DModel.from_config(self.configs.transformer))

    @cached_property
    def vae(self) -> AutoencoderDC:
        return self._empty_network(lambda: AutoencoderDC.from_config(self.configs.vae))

    @cached_property
    def controlnet(self) -> SanaControlNetModel | SanaMultiControlNetModel | None:
        """None for a pipeline without; ValueError for one that is not for such a transformer."""
        config = self.configs.controlnet
        if config is None:
            return None
        if isinstance(config, int):
            return self._empty_network(lambda: SanaControlNetModel.from_transformer(self.transformer, config))
        controlnet = self._empty_network(lambda: controlnet_class(config).from_config(config))
        for one in controlnet.nets if isinstance(controlnet, SanaMultiControlNetModel) else [controlnet]:
            check_fits(one, self.transformer)
        return controlnet

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The networks that there are, by their names in the pipeline."""
        named = {name: getattr(self, name) for name in ("text_encoder", "controlnet", "transformer", "vae")}
        return {name: module for name, module in named.items() if module is not None}

    @property
    def encodes_pictures(self) -> bool:
        """Whether a call begins with the autoencoder: for what it starts from, or for a ControlNet's drawing."""
        return self.workload.starts_from_picture or self.configs.controlnet is not None

    def stage_bytes(self, tile: int | None = None) -> dict[str, int]:
        """Of tensors at once in each stage of a call, in their order, weights apart.

        Args:
            tile: pixels of a tile's side, where pictures are encoded and decoded in tiles.
        """
        pictures = {"encode picture": self.encode_picture_bytes(tile)} if self.encodes_pictures else {}
        texts = {"encode": self.encode_bytes, "denoise": self.denoise_bytes}
        return {**pictures, **texts, "decode": self.decode_bytes(tile)}

    @cached_property
    def _reading(self) -> Counted:
        text_encoder = self.text_encoder  # made before anything is counted
        instruction = self._empty(1, INSTRUCTION_TOKENS, dtype=torch.long)
        prompts = self._empty(self.workload.batch_size, self.workload.max_sequence_length, dtype=torch.long)

        def read() -> Prefix:
            prefix = read_prefix(text_encoder, instruction)
            read_behind(text_encoder, prefix, prompts, prompts)
            return prefix

        return count(read)

    @property
    def encode_bytes(self) -> int:
        """Of tensors at once while the first prompts are read, weights apart."""
        return self._reading.peak

    @property
    def kept_bytes(self) -> int:
        """Of what the text encoder keeps of the instruction, in this call and for the next."""
        return self._reading.result

    @cached_property
    def denoise_bytes(self) -> int:
        """Of tensors at once during one step, weights apart; with a ControlNet, what it adds is held meanwhile."""
        batch_size, config = self.workload.batch_size, self.transformer.config
        latents = self._latents(config.in_channels)
        text = self._empty(batch_size, self.workload.max_sequence_length, config.caption_channels)
        ones = self._empty(batch_size)
        guidance = ones if config.guidance_embeds else None
        inputs: dict[str, Any] = {"encoder_hidden_states": text, "timestep": ones, "guidance": guidance}
        control = self._control(latents, inputs)
        return count(lambda: self.transformer(latents, controlnet_block_samples=control(), **inputs)).peak

    def _control(self, latents: torch.Tensor, inputs: dict[str, Any]) -> Callable[[], ControlSamples | None]:
        """What gives the residuals of all ControlNets."""
        network = self.controlnet
        if network is None:
            return lambda: None
        if isinstance(network, SanaControlNetModel):
            network = SanaMultiControlNetModel.from_controlnets([network])
        nets = len(network.nets)
        return lambda: network(
            latents, controlnet_cond=[latents] * nets, conditioning_scale=[1.0] * nets, return_dict=False, **inputs
        )[0]

    @cached_property
    def encode_picture_bytes(self) -> Callable[..., int]:
        """Of tensors at once while pictures are encoded, themselves included, in tiles or whole, weights apart.

        A function of the tile's side in pixels, None for no tiles, which counts once for each.
        """
        return cache(self._encode_picture_bytes)

    def _encode_picture_bytes(self, tile: int | None = None) -> int:
        config, ratio = self.vae.config, self.vae.spatial_compression_ratio
        batch_size, _, rows, columns = self._latents(config.latent_channels).shape
        pixels = self._empty(batch_size, config.in_channels, rows * ratio, columns * ratio)
        return pixels.nbytes + self._coding_bytes(self.vae.encode, pixels, tile, cell=ratio)

    @cached_property
    def decode_bytes(self) -> Callable[..., int]:
        """As above, while pictures are decoded."""
        return cache(self._decode_bytes)

    def _decode_bytes(self, tile: int | None = None) -> int:
        return self._coding_bytes(self.vae.decode, self._latents(self.vae.config.latent_channels), tile, cell=1)

    def _coding_bytes(
        self, network: Callable[[torch.Tensor], object], x: torch.Tensor, tile: int | None, cell: int
    ) -> int:
        """Of tensors at once while the autoencoder runs on x, in which a latent cell is `cell` high and wide."""
        if tile is None:
            self.vae.disable_tiling()
            return count(lambda: network(x)).peak
        self.vae.enable_tiling(tile, tile)
        # One tile takes what the next one takes: two are counted, and of the others their place in the result.
        side = tile // self.vae.spatial_compression_ratio * cell
        height, width = (side + cell, side) if x.shape[2] > side else (side, side + cell)
        two_tiles = x[:, :, :height, :width]
        counted = count(lambda: network(two_tiles))
        return counted.peak + counted.result * (x.numel() - two_tiles.numel()) // two_tiles.numel()

    def _latents(self, channels: int) -> torch.Tensor:
        size = self.workload
        rows, columns = (-(-pixels // self.vae.spatial_compression_ratio) for pixels in (size.height, size.width))
        return self._empty(size.batch_size, channels, rows, columns)

    def _empty_network(self, make: Callable[[], Any]) -> Any:
        with init_empty_weights(include_buffers=True):
            return make().to(self.workload.dtype).eval()

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype or self.workload.dtype)


def _quantised(module: nn.Module) -> Iterator[nn.Linear | PointwiseConv2d]:
    return (layer for name, layer in quantisable_layers(module) if not is_exact(name))


def weight_bytes(module: nn.Module, bits: int = 16) -> int:
    """Of parameters and buffers in their own dtypes, or with the matrix products quantised to 8 or 4 bits."""
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in (*module.parameters(), *module.buffers()))
    if bits == 16:
        return total
    for layer in _quantised(module):
        rows, numbers = layer.weight.shape[0], layer.weight.numel()
        scales = rows if bits == 8 else -(-numbers // _WEIGHTS_PER_SCALE)
        total += numbers * bits // 8 + scales * _SCALE_BYTES - layer.weight.nbytes
    return total


def table_bytes(module: nn.Module) -> int:
    """Of tables of embeddings, which on a CPU stay in their mapped file, but for the rows of a call's tokens."""
    return sum(layer.weight.nbytes for layer in module.modules() if isinstance(layer, nn.Embedding))


def unpacked_bytes(module: nn.Module, bits: int) -> int:
    """Of what a product with quantised weights takes on top: with 4 bits the largest matrix, unpacked."""
    if bits != 4:
        return 0
    return max(layer.weight.numel() * layer.weight.dtype.itemsize for layer in _quantised(module))


def largest_layer_bytes(module: nn.Module) -> int:
    """Of the weights on the device at once where each layer's come and go by themselves."""
    return max(weight_bytes(layer) for layer in module.modules() if not any(layer.children()))


def streamed_bytes(module: nn.Module) -> int:
    """Of the weights on the device at once where blocks come and go: two, and all that is in no list of blocks."""
    total = weight_bytes(module)
    for blocks in module.children():
        if isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            sizes = sorted((weight_bytes(block) for block in blocks), reverse=True)
            total -= sum(sizes[_BLOCKS_AT_ONCE:])
    return total
