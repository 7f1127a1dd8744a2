"""Shapes of an autoencoder's tensors, under diffusers' names, to its config and a name for people."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sana_sprint.checkpoints.evidence import Ambiguity, Shapes, count_of, hint_in, sizes, vote, with_given

SANA_SCALING_FACTOR = 0.41407
# Compression ratio to the scaling factors of two trainings ("mix" of data sets, or "in": ImageNet) of one config.
SCALING_FACTORS = {
    32: {"mix": 0.4552, "in": 0.3189},
    64: {"mix": 0.4538, "in": 0.2889},
    128: {"mix": 0.3620, "in": 0.4883},
}
# Every published model has one further scale of attention, of this kernel, or none.
SCALE_KERNEL = 5
# Tensors of a block whose first axis is the stage's width.
AS_WIDE_AS_STAGE = re.compile(
    r"conv1\.(weight|bias)|conv2\.weight|norm\.(weight|bias)"
    r"|attn\.(to_out\.weight|norm_out\.(weight|bias))|conv_out\.(conv_point\.weight|norm\.(weight|bias))"
)


@dataclass(frozen=True)
class _Stage:
    """One resolution of an encoder or decoder, as far as its tensors tell."""

    channels: int | None  # None where there are no blocks
    num_layers: int
    block_type: str
    kernel_sizes: tuple[int, ...]
    norm_type: str | None


def _stage(tensors: Mapping[int, Shapes]) -> _Stage:
    """One stage, from the tensors of its blocks by number; what only resamples is no block."""
    attends = {j for j, names in tensors.items() if any(name.startswith(("attn.", "conv_out.")) for name in names)}
    plain = {j for j, names in tensors.items() if any(name.startswith(("conv1.", "conv2.", "norm.")) for name in names)}
    blocks = attends | plain
    if not blocks:
        return _Stage(None, 0, "ResBlock", (), None)
    shapes = [(name, shape) for j in blocks for name, shape in tensors[j].items() if shape]
    scales = [(name, shape) for name, shape in shapes if name.startswith("attn.to_qkv_multiscale.0.")]
    kernels = [shape[-1] for name, shape in scales if name.endswith("proj_in.weight")]
    batch_normed = sum(any("running_" in name for name in tensors[j]) for j in blocks)
    return _Stage(
        channels=vote(
            (shape[0] for name, shape in shapes if AS_WIDE_AS_STAGE.fullmatch(name)), what="width of a stage"
        ),
        num_layers=len(blocks),
        block_type="EfficientViTBlock" if 2 * len(attends) > len(blocks) else "ResBlock",
        kernel_sizes=(vote(kernels, default=SCALE_KERNEL),) if scales else (),
        norm_type="batch_norm" if 2 * batch_normed > len(blocks) else "rms_norm",
    )


def _stages(shapes: Shapes, prefix: str) -> list[_Stage]:
    """All stages under `prefix`, full resolution first."""
    expression = re.compile(re.escape(prefix) + r"\.(\d+)\.(\d+)\.(.+)")
    tensors: dict[int, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        if found := expression.fullmatch(name):
            tensors.setdefault(int(found[1]), {}).setdefault(int(found[2]), {})[found[3]] = shape
    return [_stage(tensors.get(index, {})) for index in range(count_of(tensors))]


def _widths(stages: list[_Stage]) -> tuple[int, ...]:
    """Width per stage; one without blocks, whose width only a config knows, is half as wide as the next."""
    widths: list[int] = []
    for stage in reversed(stages):
        widths.insert(0, stage.channels or (widths[0] // 2 if widths else 1))
    return tuple(widths)


def _norm_types(stages: list[_Stage]) -> list[str]:
    """Norm per stage; one without blocks is given the next one's."""
    norms: list[str] = []
    for stage in reversed(stages):
        norms.insert(0, stage.norm_type or (norms[0] if norms else "rms_norm"))
    return norms


def _one_or_all(names: list[str]) -> str | tuple[str, ...]:
    """As published configs have it: one name where all stages have the same."""
    return names[0] if len(set(names)) == 1 else tuple(names)


def _is_shuffled(shapes: Shapes, prefix: str, rows: list[int]) -> bool:
    """Whether most resampling convolutions have the `rows` per stage that go with a pixel (un)shuffle."""
    expression = re.compile(re.escape(prefix) + r"\.(\d+)\.\d+\.conv\.(?:weight|bias)")
    places = ((expression.fullmatch(name), shape) for name, shape in shapes.items() if shape)
    votes = [shape[0] == rows[int(found[1])] for found, shape in places if found and int(found[1]) < len(rows)]
    return 2 * sum(votes) > len(votes)


def _scaling_factor(is_sana: bool, ratio: int, name: str) -> tuple[float, list[Ambiguity]]:
    """What gives the latents unit variance: shapes tell the sana family, a file's name the others."""
    factors = SCALING_FACTORS.get(ratio)
    if factors is None:
        question = f"what gives the latents unit variance (no model of ratio {ratio} is published)"
        return 1.0, [Ambiguity("scaling_factor", 1.0, ("another",), question)]
    if is_sana:
        return SANA_SCALING_FACTOR, []
    if hint := hint_in(r"(?<![a-z])(in|mix)-1\.0", name):
        return factors[hint], []
    question = "trained on a mix of data sets, or ImageNet alone"
    return factors["mix"], [Ambiguity("scaling_factor", factors["mix"], (factors["in"],), question)]


def autoencoder_config(shapes: Shapes, name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Ambiguity]]:
    """Config of an AutoencoderDC, and what of it is in doubt.

    Args:
        shapes: of the model's tensors, under diffusers' names.
        name: the file's, for what shapes cannot tell.
        given: settings that are known already; they are taken as they are.

    Raises:
        ValueError: if there are not as many stages down as up.
    """
    encoder, decoder = _stages(shapes, "encoder.down_blocks"), _stages(shapes, "decoder.up_blocks")
    if len(encoder) != len(decoder) or len(encoder) < 2:
        raise ValueError(
            "an autoencoder needs as many stages down as up, two or more; this checkpoint has"
            f" {len(encoder)} and {len(decoder)}"
        )
    down, up = _widths(encoder), _widths(decoder)
    unshuffles = _is_shuffled(shapes, "encoder.down_blocks", [width // 4 for width in down[1:]])
    shuffles = _is_shuffled(shapes, "decoder.up_blocks", [width * 4 for width in up])
    # DC-AE Lite keeps sana's encoder before a decoder that starts at half the resolution.
    is_lite = encoder[0].num_layers > 0 and decoder[0].num_layers == 0
    pictures = [
        *sizes(shapes, r"encoder\.conv_in(\.conv)?\.weight", 1),
        *sizes(shapes, r"decoder\.conv_out\.(weight|bias)", 0),
        *(rows // (4 if shuffles else 1) for rows in sizes(shapes, r"decoder\.conv_out\.conv\.(weight|bias)", 0)),
    ]
    latents = sizes(shapes, r"encoder\.conv_out\.(weight|bias)", 0) + sizes(shapes, r"decoder\.conv_in\.weight", 1)
    norms = _norm_types(decoder)
    final_activation, other_activation = ("silu", "relu") if is_lite else ("relu", "silu")
    ratio = 2 ** (len(down) - 1)
    scaling_factor, doubts = _scaling_factor(not unshuffles, ratio, name)
    if ratio not in SCALING_FACTORS:
        question = f"activation before the last convolution (no model of ratio {ratio} is published)"
        doubts.append(Ambiguity("decoder_conv_act_fn", final_activation, (other_activation,), question))
    config: dict[str, Any] = {
        "in_channels": vote(pictures, default=3),
        "latent_channels": vote(latents, what="number of latent channels"),
        "attention_head_dim": vote(sizes(shapes, r".+\.to_qkv_multiscale\.\d+\.proj_out\.weight", 1), default=32),
        "encoder_block_types": _one_or_all([stage.block_type for stage in encoder]),
        "decoder_block_types": _one_or_all([stage.block_type for stage in decoder]),
        "encoder_block_out_channels": down,
        "decoder_block_out_channels": up,
        "encoder_layers_per_block": tuple(stage.num_layers for stage in encoder),
        "decoder_layers_per_block": tuple(stage.num_layers for stage in decoder),
        "encoder_qkv_multiscales": tuple(stage.kernel_sizes for stage in encoder),
        "decoder_qkv_multiscales": tuple(stage.kernel_sizes for stage in decoder),
        "upsample_block_type": "pixel_shuffle" if shuffles else "interpolate",
        "downsample_block_type": "pixel_unshuffle" if unshuffles else "Conv",  # spelt as in published configs
        "decoder_norm_types": _one_or_all(norms),
        "decoder_act_fns": _one_or_all(["relu" if norm == "batch_norm" else "silu" for norm in norms]),
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "decoder_conv_act_fn": final_activation,
        "scaling_factor": scaling_factor,
    }
    return with_given(config, given), [doubt for doubt in doubts if doubt.setting not in given]


def autoencoder_name(config: Mapping[str, Any]) -> str:
    """What people call an autoencoder of this config."""
    ratio = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    code = f"f{ratio}c{config['latent_channels']}"
    if config["downsample_block_type"] != "pixel_unshuffle":
        is_lite = config["upsample_block_type"] != "interpolate"
        return f"DC-AE Lite {code}" if is_lite else f"DC-AE {code} (sana-1.0 or 1.1)"
    trainings = {factor: training for training, factor in SCALING_FACTORS.get(ratio, {}).items()}
    training = trainings.get(config["scaling_factor"])
    return f"DC-AE {code} ({training}-1.0)" if training else f"DC-AE {code}"
