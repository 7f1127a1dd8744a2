"""Checkpoints in the original layout, at any size: written from the published names and shapes, not from our tables."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Original:
    """A checkpoint's tensors and its file's name, which tells what tensors cannot."""

    name: str
    tensors: Tensors
    file_name: str = ""


def block_shapes(prefix: str, width: int, qk_norm: bool) -> Shapes:
    """One block of NVlabs' transformer."""
    shapes: Shapes = {
        "scale_shift_table": (6, width),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "cross_attn.q_linear.weight": (width, width),
        "cross_attn.q_linear.bias": (width,),
        "cross_attn.kv_linear.weight": (2 * width, width),
        "cross_attn.kv_linear.bias": (2 * width,),
        "cross_attn.proj.weight": (width, width),
        "cross_attn.proj.bias": (width,),
        "mlp.inverted_conv.conv.weight": (5 * width, width, 1, 1),
        "mlp.inverted_conv.conv.bias": (5 * width,),
        "mlp.depth_conv.conv.weight": (5 * width, 1, 3, 3),
        "mlp.depth_conv.conv.bias": (5 * width,),
        "mlp.point_conv.conv.weight": (width, 5 * width // 2, 1, 1),
    }
    if qk_norm:
        for name in ("attn.q_norm", "attn.k_norm", "cross_attn.q_norm", "cross_attn.k_norm"):
            shapes[f"{name}.weight"] = (width,)
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def transformer_shapes(
    width: int = 64,
    depth: int = 2,
    channels: int = 4,
    caption: int = 12,
    tokens: int = 16,
    qk_norm: bool = False,
    guidance: bool = False,
    logvar: bool = False,
    y_embedding: bool = True,
    control_depth: int = 0,
) -> Shapes:
    """A .pth file of NVlabs; `tokens` is the length of `pos_embed`, 0 for none."""
    shapes: Shapes = {"pos_embed": (1, tokens, width)} if tokens else {}
    shapes |= {"x_embedder.proj.weight": (width, channels, 1, 1), "x_embedder.proj.bias": (width,)}
    for embedder in ("t_embedder", "cfg_embedder") if guidance else ("t_embedder",):
        shapes |= {f"{embedder}.mlp.0.weight": (width, 256), f"{embedder}.mlp.0.bias": (width,)}
        shapes |= {f"{embedder}.mlp.2.weight": (width, width), f"{embedder}.mlp.2.bias": (width,)}
    shapes |= {"t_block.1.weight": (6 * width, width), "t_block.1.bias": (6 * width,)}
    if y_embedding:
        shapes["y_embedder.y_embedding"] = (7, caption)
    shapes |= {"y_embedder.y_proj.fc1.weight": (width, caption), "y_embedder.y_proj.fc1.bias": (width,)}
    shapes |= {"y_embedder.y_proj.fc2.weight": (width, width), "y_embedder.y_proj.fc2.bias": (width,)}
    shapes["attention_y_norm.weight"] = (width,)
    for index in range(depth):
        shapes |= block_shapes(f"blocks.{index}", width, qk_norm)
    shapes |= {"final_layer.linear.weight": (channels, width), "final_layer.linear.bias": (channels,)}
    shapes["final_layer.scale_shift_table"] = (2, width)
    if logvar:
        shapes |= {"logvar_linear.weight": (1, width), "logvar_linear.bias": (1,)}
    for index in range(control_depth):
        shapes |= block_shapes(f"controlnet.{index}.copied_block", width, qk_norm)
        for exit_ in ("before_proj", "after_proj") if index == 0 else ("after_proj",):
            shapes |= {
                f"controlnet.{index}.{exit_}.weight": (width, width),
                f"controlnet.{index}.{exit_}.bias": (width,),
            }
    return shapes


def norm_shapes(prefix: str, width: int, batch: bool = False) -> Shapes:
    shapes: Shapes = {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}
    if batch:
        shapes |= {f"{prefix}.running_mean": (width,), f"{prefix}.running_var": (width,)}
        shapes[f"{prefix}.num_batches_tracked"] = ()
    return shapes


def conv_shapes(prefix: str, rows: int, columns: int) -> Shapes:
    return {f"{prefix}.weight": (rows, columns, 3, 3), f"{prefix}.bias": (rows,)}


def coder_block_shapes(prefix: str, kind: str, width: int, kernels: tuple[int, ...], batch: bool) -> Shapes:
    """One block of efficientvit: "ResBlock", or "EfficientViTBlock" with heads of 32 channels."""
    if kind == "ResBlock":
        shapes = conv_shapes(f"{prefix}.main.conv1.conv", width, width)
        shapes[f"{prefix}.main.conv2.conv.weight"] = (width, width, 3, 3)
        return shapes | norm_shapes(f"{prefix}.main.conv2.norm", width, batch)
    attention, feed_forward = f"{prefix}.context_module.main", f"{prefix}.local_module.main"
    shapes = {f"{attention}.qkv.conv.weight": (3 * width, width, 1, 1)}
    for scale, kernel in enumerate(kernels):
        shapes[f"{attention}.aggreg.{scale}.0.weight"] = (3 * width, 1, kernel, kernel)
        shapes[f"{attention}.aggreg.{scale}.1.weight"] = (3 * width, 32, 1, 1)
    shapes[f"{attention}.proj.conv.weight"] = (width, width * (1 + len(kernels)), 1, 1)
    shapes |= norm_shapes(f"{attention}.proj.norm", width, batch)
    shapes |= {f"{feed_forward}.inverted_conv.conv.weight": (8 * width, width, 1, 1)}
    shapes |= {f"{feed_forward}.inverted_conv.conv.bias": (8 * width,)}
    shapes |= {f"{feed_forward}.depth_conv.conv.weight": (8 * width, 1, 3, 3)}
    shapes |= {f"{feed_forward}.depth_conv.conv.bias": (8 * width,)}
    shapes |= {f"{feed_forward}.point_conv.conv.weight": (width, 4 * width, 1, 1)}
    return shapes | norm_shapes(f"{feed_forward}.point_conv.norm", width)


def autoencoder_shapes(
    widths: tuple[int, ...],
    latent: int,
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    variant: str,
) -> Shapes:
    """A file of efficientvit; `variant` is "sana", "lite" or "imagenet". Three stages of ResBlocks come first."""
    unshuffles, shuffles = variant == "imagenet", variant != "sana"
    kernels = () if variant == "imagenet" else (5,)
    down, up = (4 if unshuffles else 1), (4 if shuffles else 1)
    shapes: Shapes = {}
    if encoder_layers[0]:
        shapes |= conv_shapes("encoder.project_in.conv", widths[0], 3)
    else:
        shapes |= conv_shapes("encoder.project_in.conv.conv", widths[1] // down, 3)
    for index, (width, layers) in enumerate(zip(widths, encoder_layers, strict=True)):
        stage, kind = f"encoder.stages.{index}.op_list", "ResBlock" if index < 3 else "EfficientViTBlock"
        for layer in range(layers):
            shapes |= coder_block_shapes(f"{stage}.{layer}", kind, width, kernels, batch=False)
        if layers and index + 1 < len(widths):
            name = f"{stage}.{layers}.main.conv" + (".conv" if unshuffles else "")
            shapes |= conv_shapes(name, widths[index + 1] // down, width)
    shapes |= conv_shapes("encoder.project_out.main.op_list.0.conv", latent, widths[-1])

    shapes |= conv_shapes("decoder.project_in.main.conv", widths[-1], latent)
    for index, (width, layers) in enumerate(zip(widths, decoder_layers, strict=True)):
        stage, is_plain = f"decoder.stages.{index}.op_list", index < 3 or variant == "lite"
        first = 0
        if layers and index + 1 < len(widths):
            shapes |= conv_shapes(f"{stage}.0.main.conv.conv", width * up, widths[index + 1])
            first = 1
        for layer in range(first, first + layers):
            kind, batch = "ResBlock" if is_plain else "EfficientViTBlock", variant == "imagenet" and index < 3
            shapes |= coder_block_shapes(f"{stage}.{layer}", kind, width, kernels, batch)
    head = widths[0] if decoder_layers[0] else widths[1]
    shapes |= norm_shapes("decoder.project_out.op_list.0", head)
    name = "decoder.project_out.op_list.2.conv" + ("" if decoder_layers[0] else ".conv")
    return shapes | conv_shapes(name, 3 if decoder_layers[0] else 3 * up, head)


def random_tensors(shapes: Shapes, seed: int = 0) -> Tensors:
    """Values of which none is zero, one or equal to another, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(len(tensors))
            continue
        inputs = torch.Size(shape[1:]).numel() if len(shape) > 1 else 16
        tensors[name] = torch.randn(shape, generator=generator) / inputs**0.5
        if name.endswith("running_var"):
            tensors[name] = tensors[name].abs() + 0.5
    return tensors


SPRINT = {"qk_norm": True, "guidance": True}
DEEP = (4, 8, 16, 32, 64, 64, 64, 64)


def _imagenet(stages: int) -> dict[str, Any]:
    tail = (2,) * (stages - 6)
    layers = {"encoder_layers": (0, 2, 1, 1, 1, 1, *tail), "decoder_layers": (0, 1, 2, 1, 1, 1, *tail)}
    return {"widths": DEEP[:stages], "latent": 4, "variant": "imagenet", **layers}


# Every family at a reduced size: its shapes, and the name of its file where tensors cannot tell what it is.
REDUCED: dict[str, tuple[Shapes, str]] = {
    "sana": (transformer_shapes(), ""),
    "sana-1.5": (transformer_shapes(qk_norm=True), "SANA1.5_1.6B_1024px.pth"),
    "teacher": (transformer_shapes(qk_norm=True), "Sana_Sprint_1.6B_1024px_teacher.pth"),
    "sprint": (transformer_shapes(**SPRINT, logvar=True), ""),
    "sprint-bare": (transformer_shapes(**SPRINT, tokens=0, y_embedding=False), "Sana_Sprint_0.6B_1024px.pth"),
    "sana-2k": (transformer_shapes(tokens=64 * 64), ""),
    "controlnet": (transformer_shapes(depth=3, control_depth=2), ""),
    "dc-ae-sana": (
        autoencoder_shapes(DEEP[:6], 4, (1, 1, 2, 1, 1, 2), (1, 2, 1, 1, 2, 1), "sana"),
        "dc-ae-f32c32-sana-1.1/model.safetensors",
    ),
    "dc-ae-lite": (autoencoder_shapes(DEEP[:6], 4, (1, 1, 2, 1, 1, 2), (0, 1, 2, 1, 1, 2), "lite"), ""),
    "dc-ae-f32": (autoencoder_shapes(**_imagenet(6)), "dc-ae-f32c32-in-1.0/model.safetensors"),
    "dc-ae-f64": (autoencoder_shapes(**_imagenet(7)), "dc-ae-f64c128-mix-1.0/model.safetensors"),
    "dc-ae-f128": (autoencoder_shapes(**_imagenet(8)), "dc-ae-f128c512-in-1.0/model.safetensors"),
}


WIDTHS = (128, 256, 512, 512, 1024, 1024)
SIZE_0_6B = {"width": 1152, "depth": 28, "channels": 32, "caption": 2304, "tokens": 1024}
SIZE_1_6B = {"width": 2240, "depth": 20, "channels": 32, "caption": 2304, "tokens": 1024}


def _published_imagenet(widths: tuple[int, ...], latent: int) -> Shapes:
    tail = (2,) * (len(widths) - 3)
    return autoencoder_shapes(widths, latent, (0, 4, 8, *tail), (0, 5, 10, *tail), "imagenet")


# Every family at the size it was published in.
PUBLISHED: dict[str, Shapes] = {
    "sana-0.6b": transformer_shapes(**SIZE_0_6B),
    "sana-0.6b-teacher": transformer_shapes(**SIZE_0_6B, qk_norm=True),
    "sprint-0.6b": transformer_shapes(**SIZE_0_6B, **SPRINT, logvar=True),
    "sana-1.6b": transformer_shapes(**SIZE_1_6B),
    "sana-1.6b-512": transformer_shapes(**{**SIZE_1_6B, "tokens": 16 * 16}),
    "sana-1.6b-2k": transformer_shapes(**{**SIZE_1_6B, "tokens": 64 * 64}),
    "sana-1.6b-4k": transformer_shapes(**{**SIZE_1_6B, "tokens": 128 * 128}),
    "sana1.5-1.6b": transformer_shapes(**SIZE_1_6B, qk_norm=True),
    "sprint-1.6b": transformer_shapes(**SIZE_1_6B, **SPRINT, logvar=True),
    "sana1.5-4.8b": transformer_shapes(**{**SIZE_1_6B, "depth": 60}, qk_norm=True),
    "controlnet-0.6b": transformer_shapes(**SIZE_0_6B, control_depth=7),
    "controlnet-1.6b": transformer_shapes(**SIZE_1_6B, control_depth=7),
    "dc-ae-sana": autoencoder_shapes(WIDTHS, 32, (2, 2, 2, 3, 3, 3), (3, 3, 3, 3, 3, 3), "sana"),
    "dc-ae-lite": autoencoder_shapes(WIDTHS, 32, (2, 2, 2, 3, 3, 3), (0, 3, 5, 4, 4, 4), "lite"),
    "dc-ae-f32": _published_imagenet(WIDTHS, 32),
    "dc-ae-f64": _published_imagenet((*WIDTHS, 2048), 128),
    "dc-ae-f128": _published_imagenet((*WIDTHS, 2048, 2048), 512),
}


@pytest.fixture
def reduced() -> Callable[[str], Original]:
    """Make a family of `REDUCED` with random tensors."""

    def make(name: str) -> Original:
        shapes, file_name = REDUCED[name]
        return Original(name, random_tensors(shapes), file_name)

    return make


@pytest.fixture(params=sorted(REDUCED))
def original(request: pytest.FixtureRequest, reduced: Callable[[str], Original]) -> Original:
    """Each family of `REDUCED` in turn, with random tensors."""
    return reduced(request.param)


@pytest.fixture
def published() -> Callable[[str], Shapes]:
    """Shapes of a family of `PUBLISHED`."""
    return lambda name: dict(PUBLISHED[name])


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint under the name it is published with; `root` is what a .pth file holds."""

    def write(original: Original, root: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "in" / (original.file_name or "model.pth")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(original.tensors, path)
        else:
            torch.save(root or {"state_dict": original.tensors}, path)
        return path

    return write
