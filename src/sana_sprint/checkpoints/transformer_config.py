"""Shapes of a transformer's tensors, under diffusers' names, to its config and a name for people."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from sana_sprint.checkpoints.evidence import (
    Ambiguity,
    Shapes,
    count_of,
    hint_in,
    numbers,
    positive_integer,
    sizes,
    vote,
    with_given,
)
from sana_sprint.transformer.residuals import Placement

# Published: width of the network to width of a cross-attention head. Self-attention heads are 32 wide.
CROSS_HEAD_DIMS = {1152: 72, 2240: 112}
SELF_HEAD_DIM = 32
# Published: width and depth to size.
SIZES = {(1152, 28): "0.6B", (2240, 20): "1.6B", (2240, 60): "4.8B"}
CONTROL_DEPTH = 7
CONTROL_SIZES = {1152: "0.6B", 2240: "1.6B"}
# Latent cells per side to the scale of positional embeddings; smaller models have none.
INTERPOLATION_SCALES = {64: 1.0, 128: 2.0}
SAMPLE_SIZES = {"512": 16, "1024": 32, "2k": 64, "2048": 64, "4k": 128, "4096": 128}
PIXELS_PER_CELL = 32
CHANNELS, CAPTION_CHANNELS = 32, 2304
TEACHER_TIMESTEP_SCALE = 0.001
PLACEMENT, PLACEMENTS = "residual_placement", get_args(Placement)


def _channels(shapes: Shapes, prior: list[int]) -> tuple[int, int]:
    """Latent channels and patch size."""
    patch = vote(sizes(shapes, r"patch_embed\.proj\.weight", 3), default=1)
    rows = sizes(shapes, r"proj_out\.(weight|bias)", 0)
    columns = sizes(shapes, r"patch_embed\.proj\.weight", 1)
    return vote([*prior, *columns, *(row // patch**2 for row in rows)], default=CHANNELS), patch


def _sample_size(positions: tuple[int, ...], patch: int, name: str) -> tuple[int, list[Ambiguity]]:
    """Latent cells per side that the model was trained on: from its positional buffer, else its file's name."""
    side = math.isqrt(positions[1]) if len(positions) == 3 else 0
    if side and side**2 == positions[1]:
        return side * patch, []
    if hint := hint_in(r"(512|1024|2048|4096|2k|4k)px", name):
        return SAMPLE_SIZES[hint], []
    return 32, [Ambiguity("sample_size", 32, (16, 64, 128), "trained for 1024 pixels, or 512, 2K, 4K")]


def _timestep_scale(width: int, depth: int, name: str) -> tuple[float, list[Ambiguity]]:
    """Of a model with normalised queries and keys but no guidance: a teacher of Sprint, or SANA 1.5."""
    hint = hint_in(r"teacher|sana_?1[._]5", name)
    if hint == "teacher":
        return TEACHER_TIMESTEP_SCALE, []
    if hint or (width, depth) == (2240, 60):
        return 1.0, []
    # Of this kind only the teacher is published at 0.6B.
    chosen, other = (TEACHER_TIMESTEP_SCALE, 1.0) if width == 1152 else (1.0, TEACHER_TIMESTEP_SCALE)
    return chosen, [Ambiguity("timestep_scale", chosen, (other,), "SANA 1.5 (1.0) or a teacher of Sprint (0.001)")]


def _head_dims(width: int, given: Mapping[str, Any]) -> tuple[int, int, list[Ambiguity]]:
    """Width of a head of self and of cross attention; of unpublished sizes, whoever knows the latter has to say."""
    doubts = []
    head_dim = positive_integer(given, "attention_head_dim") or SELF_HEAD_DIM
    cross_head_dim = positive_integer(given, "cross_attention_head_dim") or CROSS_HEAD_DIMS.get(width)
    cross_heads = positive_integer(given, "num_cross_attention_heads")
    if cross_heads and "cross_attention_head_dim" not in given:
        cross_head_dim = max(width // cross_heads, 1)
    if cross_head_dim is None:
        cross_head_dim = head_dim
        question = f"width of the cross-attention heads (no model of width {width} is published)"
        doubts.append(Ambiguity("cross_attention_head_dim", head_dim, ("another divisor of the width",), question))
    for size in (head_dim, cross_head_dim):
        if width % size:
            raise ValueError(f"the width {width} is not a whole number of attention heads of {size}")
    return head_dim, cross_head_dim, doubts


def transformer_config(
    shapes: Shapes, extras: Shapes, name: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Ambiguity]]:
    """Config of a SanaTransformer2DModel.

    Args:
        shapes: of the model's tensors, under diffusers' names.
        extras: of everything else in the file, under its own names.
        name: the file's, for what shapes cannot tell.
        given: settings that are known already; they are taken as they are.

    Raises:
        ValueError: if the tensors that show the width are missing, or it is not a whole number of heads.
    """
    tables = sizes(shapes, r"(transformer_blocks\.\d+\.)?scale_shift_table", 1)
    width = vote(tables + sizes(shapes, r"transformer_blocks\.\d+\.attn[12]\.to_out\.0\.bias", 0), what="width")
    depth = count_of(numbers(shapes, r"transformer_blocks\.(\d+)\."))
    # A network of published width has a vote for published inputs, where a single tensor shows each of them.
    is_published = width in CROSS_HEAD_DIMS
    channels, patch = _channels(shapes, [CHANNELS] * is_published)
    captions = [
        *[CAPTION_CHANNELS] * is_published,
        *sizes(shapes, r"caption_projection\.linear_1\.weight", 1),
        *sizes(extras, r"y_embedder\.y_embedding", 1),
    ]
    hidden = vote(sizes(shapes, r"transformer_blocks\.\d+\.ff\.conv_(depth|inverted)\.bias", 0), default=5 * width)
    norms = sizes(shapes, r"transformer_blocks\.\d+\.attn[12]\.norm_[qk]\.weight", 0)
    qk_norm = len(norms) >= 2 * depth  # half of the four per block
    guidance = any(key.startswith("time_embed.guidance_embedder.") for key in shapes) or any(
        key.startswith("logvar_linear.") for key in extras
    )
    doubts: list[Ambiguity] = []

    head_dim, cross_head_dim, doubt = _head_dims(width, given)
    doubts += doubt
    sample_size, doubt = _sample_size(extras.get("pos_embed", ()), patch, name)
    doubts += doubt
    timestep_scale = 1.0
    if qk_norm and not guidance:
        timestep_scale, doubt = _timestep_scale(width, depth, name)
        doubts += doubt
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": depth,
        "num_cross_attention_heads": width // cross_head_dim,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": width,
        "caption_channels": vote(captions, default=CAPTION_CHANNELS),
        "mlp_ratio": hidden / (2 * width),
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": sample_size,
        "patch_size": patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": INTERPOLATION_SCALES.get(positive_integer(given, "sample_size") or sample_size),
        "guidance_embeds": guidance,
        "guidance_embeds_scale": 0.1,
        "qk_norm": "rms_norm_across_heads" if qk_norm else None,
        "timestep_scale": timestep_scale,
    }
    return with_given(config, given), [doubt for doubt in doubts if doubt.setting not in given]


def controlnet_config(
    shapes: Shapes, extras: Shapes, name: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Ambiguity]]:
    """Config of a SanaControlNetModel: its trunk's, and where its residuals go. Arguments as `transformer_config`.

    Who runs it as NVlabs does needs the transformer's first block, which is there or is not.
    """
    own = {key: value for key, value in given.items() if key != PLACEMENT}
    config, doubts = transformer_config(shapes, extras, name, own)
    has_base_block = any(key.startswith("base_block.") for key in shapes)
    placement = given.get(PLACEMENT, "before" if has_base_block else "after")
    if placement not in PLACEMENTS:
        raise ValueError(f"{PLACEMENT} must be {' or '.join(PLACEMENTS)}, got {placement!r}")
    return {**config, PLACEMENT: placement}, doubts


def transformer_name(config: Mapping[str, Any], is_control: bool = False) -> str:
    """What people call a transformer, or a ControlNet, of this config."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    depth = config["num_layers"]
    of_blocks = f"of {depth} blocks of width {width}"
    pixels = config["sample_size"] * PIXELS_PER_CELL
    if config["guidance_embeds"]:
        model = "SANA-Sprint"
    elif config["timestep_scale"] == TEACHER_TIMESTEP_SCALE:
        model = "SANA-Sprint teacher"
    else:
        model = "SANA 1.5" if config["qk_norm"] else "SANA"
    if is_control:
        size = CONTROL_SIZES.get(width, of_blocks) if depth == CONTROL_DEPTH else of_blocks
        return f"{model} ControlNet {size}, {pixels} px"
    return f"{model} {SIZES.get((width, depth), of_blocks)}, {pixels} px"
