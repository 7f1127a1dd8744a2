"""Tensor names of the original releases to diffusers' names and back: tables, and the lookups that read them.

A row is written once and read in either direction. Sources: NVlabs/Sana and mit-han-lab/efficientvit for the original
names, diffusers' model classes for the others.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Kind = Literal["transformer", "controlnet", "autoencoder"]
Layout = Literal["original", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("original", "diffusers")

# What a mark in a row stands for. Numbers are bounded so that a damaged name cannot ask for a million blocks.
MARKS = {
    "i": r"0|[1-9]\d{0,3}",
    "j": r"0|[1-9]\d{0,3}",
    "k": r"0|[1-9]\d{0,3}",
    "p": "weight|bias",
    "s": "weight|bias|running_mean|running_var|num_batches_tracked",
}
# Of an axis, where shapes are compared.
ANY_SIZE = -1


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Rule:
    """One row: a tensor of the original layout, and what it is in diffusers'.

    Several diffusers names mean that the original holds them joined along dim 0, in this order. `{i}`, `{j}` and `{k}`
    are numbers, `{p}` a parameter and `{s}` a parameter or statistic of a norm; equal marks are equal text.
    """

    original: str
    diffusers: tuple[str, ...]
    pointwise: bool = False  # the original is a 1x1 convolution, diffusers' a matrix


@dataclass(frozen=True)
class Place:
    """Where a tensor of the diffusers layout lies in the original one."""

    name: str
    part: int  # this one ...
    count: int  # ... of so many equal parts along dim 0
    pointwise: bool


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w)\}", pattern)
    for position in range(0, len(pieces), 2):
        pieces[position] = re.escape(pieces[position])
    for position in range(1, len(pieces), 2):
        pieces[position] = f"(?P<{pieces[position]}>{MARKS[pieces[position]]})"
    return re.compile("".join(pieces))


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    nameless = (re.sub(r"\(\?P<\w>", "(?:", _expression(pattern).pattern) for pattern in patterns)
    return re.compile("|".join(f"(?:{expression})" for expression in nameless))


@dataclass(frozen=True)
class Table:
    """All rows of one kind of model, and what else its original files hold.

    `aside` names tensors that diffusers' model has no place for, with their shapes: numbers, names of sizes, or
    `ANY_SIZE`; those of one group come together or not at all. `dropped` are patterns of what can be recomputed.
    """

    rules: tuple[Rule, ...]
    aside: tuple[dict[str, tuple[int | str, ...]], ...] = ()
    dropped: tuple[str, ...] = ()

    def original_of(self, name: str) -> Place | None:
        """Where the tensor that diffusers calls `name` lies in the original; None if no row knows it."""
        for rule in self.rules:
            for part, pattern in enumerate(rule.diffusers):
                if found := _expression(pattern).fullmatch(name):
                    original = rule.original.format(**found.groupdict())
                    return Place(original, part, len(rule.diffusers), rule.pointwise)
        return None

    def diffusers_of(self, name: str) -> tuple[str, ...]:
        """What diffusers calls the parts of the original tensor `name`; empty if no row knows it."""
        for rule in self.rules:
            if found := _expression(rule.original).fullmatch(name):
                return tuple(pattern.format(**found.groupdict()) for pattern in rule.diffusers)
        return ()

    def names(self, layout: Layout) -> re.Pattern[str]:
        """An expression for every tensor of the model in `layout`."""
        if layout == "original":
            return _any_of(tuple(rule.original for rule in self.rules))
        return _any_of(tuple(pattern for rule in self.rules for pattern in rule.diffusers))

    def is_dropped(self, name: str) -> bool:
        """Whether `name` can be recomputed and is left out."""
        return bool(self.dropped) and _any_of(self.dropped).fullmatch(name) is not None


def rows(
    entries: Iterable[tuple[str, str] | tuple[str, tuple[str, ...]]], original: str = "", diffusers: str = ""
) -> tuple[Rule, ...]:
    """Rows from pairs (original, diffusers), the two prefixes put in front."""
    pairs = ((left, (right,) if isinstance(right, str) else right) for left, right in entries)
    return tuple(Rule(original + left, tuple(diffusers + name for name in right)) for left, right in pairs)


TRUNK = rows(
    [
        ("x_embedder.proj.{p}", "patch_embed.proj.{p}"),
        # Flow models nest the embedder one level deeper than Sprint; a model has one of the two.
        ("t_embedder.mlp.0.{p}", "time_embed.emb.timestep_embedder.linear_1.{p}"),
        ("t_embedder.mlp.2.{p}", "time_embed.emb.timestep_embedder.linear_2.{p}"),
        ("t_embedder.mlp.0.{p}", "time_embed.timestep_embedder.linear_1.{p}"),
        ("t_embedder.mlp.2.{p}", "time_embed.timestep_embedder.linear_2.{p}"),
        ("cfg_embedder.mlp.0.{p}", "time_embed.guidance_embedder.linear_1.{p}"),
        ("cfg_embedder.mlp.2.{p}", "time_embed.guidance_embedder.linear_2.{p}"),
        ("t_block.1.{p}", "time_embed.linear.{p}"),
        ("y_embedder.y_proj.fc1.{p}", "caption_projection.linear_1.{p}"),
        ("y_embedder.y_proj.fc2.{p}", "caption_projection.linear_2.{p}"),
        ("attention_y_norm.weight", "caption_norm.weight"),
    ]
)
BLOCK: list[tuple[str, str] | tuple[str, tuple[str, ...]]] = [
    ("scale_shift_table", "scale_shift_table"),
    ("attn.qkv.weight", ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight")),
    ("attn.q_norm.weight", "attn1.norm_q.weight"),
    ("attn.k_norm.weight", "attn1.norm_k.weight"),
    ("attn.proj.{p}", "attn1.to_out.0.{p}"),
    ("cross_attn.q_linear.{p}", "attn2.to_q.{p}"),
    ("cross_attn.kv_linear.{p}", ("attn2.to_k.{p}", "attn2.to_v.{p}")),
    ("cross_attn.q_norm.weight", "attn2.norm_q.weight"),
    ("cross_attn.k_norm.weight", "attn2.norm_k.weight"),
    ("cross_attn.proj.{p}", "attn2.to_out.0.{p}"),
    ("mlp.inverted_conv.conv.{p}", "ff.conv_inverted.{p}"),
    ("mlp.depth_conv.conv.{p}", "ff.conv_depth.{p}"),
    ("mlp.point_conv.conv.weight", "ff.conv_point.weight"),
]
HEAD = rows([("final_layer.scale_shift_table", "scale_shift_table"), ("final_layer.linear.{p}", "proj_out.{p}")])

# The text that stands for "no caption" in distillation, and the head that weighs the loss: of use in training only.
BESIDE_TRANSFORMER: tuple[dict[str, tuple[int | str, ...]], ...] = (
    {"y_embedder.y_embedding": (ANY_SIZE, "caption_channels")},
    {"logvar_linear.weight": (1, "width"), "logvar_linear.bias": (1,)},
)
# A buffer of sines; some training files hold it once more, under the name of a wrapper.
POSITIONS = ("pos_embed", "base_model.pos_embed", "model.pos_embed")

TRANSFORMER = Table(TRUNK + rows(BLOCK, "blocks.{i}.", "transformer_blocks.{i}.") + HEAD, BESIDE_TRANSFORMER, POSITIONS)

# As diffusers has it: the control starts from the latents.
CONTROLNET_OF_LATENTS = Table(
    TRUNK
    + rows(BLOCK, "controlnet.{i}.copied_block.", "transformer_blocks.{i}.")
    + rows(
        [
            ("controlnet.0.before_proj.{p}", "input_block.{p}"),
            ("controlnet.{i}.after_proj.{p}", "controlnet_blocks.{i}.{p}"),
        ]
    ),
    BESIDE_TRANSFORMER,
    POSITIONS,
)
# As NVlabs has it: the control starts from what the frozen transformer's first block makes of them.
CONTROLNET = replace(CONTROLNET_OF_LATENTS, rules=CONTROLNET_OF_LATENTS.rules + rows(BLOCK, "blocks.0.", "base_block."))

# A residual block wraps its work as `main`, a sequence its items as `op_list`.
CODER_BLOCK: list[tuple[str, str] | tuple[str, tuple[str, ...]]] = [
    ("main.conv1.conv.{p}", "conv1.{p}"),
    ("main.conv2.conv.weight", "conv2.weight"),
    ("main.conv2.norm.{s}", "norm.{s}"),
    ("context_module.main.aggreg.{k}.0.weight", "attn.to_qkv_multiscale.{k}.proj_in.weight"),
    ("context_module.main.aggreg.{k}.1.weight", "attn.to_qkv_multiscale.{k}.proj_out.weight"),
    ("context_module.main.proj.norm.{s}", "attn.norm_out.{s}"),
    ("local_module.main.inverted_conv.conv.{p}", "conv_out.conv_inverted.{p}"),
    ("local_module.main.depth_conv.conv.{p}", "conv_out.conv_depth.{p}"),
    ("local_module.main.point_conv.conv.weight", "conv_out.conv_point.weight"),
    ("local_module.main.point_conv.norm.{s}", "conv_out.norm.{s}"),
]
# Not query, key and value but thirds of the channels, which attention regroups per head; equal rows all the same.
CODER_MATRICES: list[tuple[str, str] | tuple[str, tuple[str, ...]]] = [
    ("context_module.main.qkv.conv.weight", ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")),
    ("context_module.main.proj.conv.weight", "attn.to_out.weight"),
]
STRIDED = ("main.conv.{p}", "conv.{p}")
SHUFFLED = ("main.conv.conv.{p}", "conv.{p}")


def _stages(original: str, diffusers: str, resample: tuple[str, str]) -> tuple[Rule, ...]:
    prefixes = (f"{original}.{{i}}.op_list.{{j}}.", f"{diffusers}.{{i}}.{{j}}.")
    matrices = (replace(rule, pointwise=True) for rule in rows(CODER_MATRICES, *prefixes))
    return (*rows([*CODER_BLOCK, resample], *prefixes), *matrices)


CODER_ENDS = rows(
    [
        ("encoder.project_in.conv.{p}", "encoder.conv_in.{p}"),
        ("encoder.project_in.conv.conv.{p}", "encoder.conv_in.conv.{p}"),
        ("encoder.project_out.main.op_list.0.conv.{p}", "encoder.conv_out.{p}"),
        ("decoder.project_in.main.conv.{p}", "decoder.conv_in.{p}"),
        ("decoder.project_out.op_list.0.{p}", "decoder.norm_out.{p}"),
        ("decoder.project_out.op_list.2.conv.{p}", "decoder.conv_out.{p}"),
        ("decoder.project_out.op_list.2.conv.conv.{p}", "decoder.conv_out.conv.{p}"),
    ]
)
DECODER = _stages("decoder.stages", "decoder.up_blocks", SHUFFLED)
AUTOENCODER_STRIDED = Table(CODER_ENDS + _stages("encoder.stages", "encoder.down_blocks", STRIDED) + DECODER)
AUTOENCODER_SHUFFLED = Table(CODER_ENDS + _stages("encoder.stages", "encoder.down_blocks", SHUFFLED) + DECODER)


# NVlabs' ControlNet files hold the frozen transformer too; each of the two finds the other's tensors beside its own.
COMPANIONS: dict[Kind, Table] = {"controlnet": TRANSFORMER, "transformer": CONTROLNET}


def table_of(kind: Kind, config: Mapping[str, Any]) -> Table:
    """The table of a model of this kind and config."""
    if kind == "autoencoder":
        return AUTOENCODER_SHUFFLED if config["downsample_block_type"] == "pixel_unshuffle" else AUTOENCODER_STRIDED
    if kind == "transformer":
        return TRANSFORMER
    return CONTROLNET if config["residual_placement"] == "before" else CONTROLNET_OF_LATENTS
