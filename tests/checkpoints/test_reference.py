"""The original networks, written out from their published description, beside our models with converted weights.

What is split into query, key and value, in what order, and what is regrouped afterwards, is proved here: the reference
reads the fused tensors under their original names. B batch, C channels, N tokens, D width, L text tokens, d head width.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.plan import TensorInfo, plan_conversion
from sana_sprint.checkpoints.recognise import Family, recognise
from sana_sprint.checkpoints.rules import Kind
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

# The same sums in float32 in another order, through some twenty layers: about 1e-6 of the largest value.
FLOAT32 = 2e-5
HEAD_DIM = 32
# Of reduced checkpoints, chosen unlike the self attention's so that one cannot pass for the other.
CROSS_HEAD_DIM = 16

Tensors = dict[str, torch.Tensor]


def converted(tensors: Tensors, file_name: str = "", kind: Kind | None = None, **settings) -> tuple[Family, Tensors]:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    family = recognise(infos, file_name=file_name, settings=settings, kind=kind)
    plan = plan_conversion(family, infos, "diffusers")
    assert plan.is_exact
    return family, {move.target: move.apply([tensors[name] for name in move.sources]) for move in plan.moves}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over largest value."""
    assert found.shape == wanted.shape
    assert wanted.isfinite().all()
    assert wanted.abs().max() > 0.1
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def relu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Linear attention of (..., d, N): the values are given a row of ones, whose result is the denominator."""
    query, key = query.relu(), key.relu()
    value = F.pad(value, (0, 0, 0, 1), value=1.0)
    summed = (value @ key.transpose(-1, -2)) @ query
    return summed[..., :-1, :] / (summed[..., -1:, :] + 1e-15)


def rms(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0, dim: int = -1) -> torch.Tensor:
    return x / (x.pow(2).mean(dim, keepdim=True) + 1e-5).sqrt() * weight + bias


class OriginalTransformer:
    """NVlabs' network, on a state dict with its own names."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.depth = sum(name.endswith(".attn.qkv.weight") and name.startswith("blocks.") for name in tensors)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def convolution(self, x: torch.Tensor, name: str, **options) -> torch.Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"), **options)

    def embed_scalar(self, values: torch.Tensor, name: str) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = values[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear(F.silu(self.linear(features, f"{name}.mlp.0")), f"{name}.mlp.2")

    def normalised(self, query: torch.Tensor, key: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if f"{name}.q_norm.weight" not in self.tensors:
            return query, key
        norms = (self.tensors[f"{name}.{letter}_norm.weight"] for letter in "qk")
        return rms(query, next(norms)), rms(key, next(norms))

    def self_attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.linear(x, f"{name}.qkv").reshape(batch, tokens, 3, width).unbind(2)
        query, key = self.normalised(query, key, name)
        heads = (part.transpose(1, 2).reshape(batch, -1, HEAD_DIM, tokens) for part in (query, key, value))  # B h d N
        return self.linear(relu_attention(*heads).reshape(batch, width, tokens).transpose(1, 2), f"{name}.proj")

    def cross_attention(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
        batch, tokens, width = x.shape
        query = self.linear(x, f"{name}.q_linear")
        key, value = self.linear(text, f"{name}.kv_linear").reshape(batch, -1, 2, width).unbind(2)
        query, key = self.normalised(query, key, name)
        query, key, value = (part.unflatten(2, (-1, CROSS_HEAD_DIM)).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(2, 3) / CROSS_HEAD_DIM**0.5 + (1 - mask.float())[:, None, None] * -10000
        attended = scores.softmax(-1) @ value
        return self.linear(attended.transpose(1, 2).reshape(batch, tokens, width), f"{name}.proj")

    def feed_forward(self, x: torch.Tensor, height: int, width: int, name: str) -> torch.Tensor:
        grid = x.transpose(1, 2).unflatten(2, (height, width))
        hidden = F.silu(self.convolution(grid, f"{name}.inverted_conv.conv"))
        hidden = self.convolution(hidden, f"{name}.depth_conv.conv", padding=1, groups=hidden.shape[1])
        value, gate = hidden.chunk(2, dim=1)
        return self.convolution(value * F.silu(gate), f"{name}.point_conv.conv").flatten(2).transpose(1, 2)

    def block(
        self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, modulation: torch.Tensor, size, name: str
    ) -> torch.Tensor:
        table = self.tensors[f"{name}.scale_shift_table"] + modulation.unflatten(1, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table[:, :, None].unbind(1)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + gate * self.self_attention(normed * (1 + scale) + shift, f"{name}.attn")
        x = x + self.cross_attention(x, text, mask, f"{name}.cross_attn")
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x + gate_ff * self.feed_forward(normed * (1 + scale_ff) + shift_ff, *size, f"{name}.mlp")

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        return self.convolution(latents, "x_embedder.proj").flatten(2).transpose(1, 2)

    def __call__(self, latents, caption, time, mask, guidance=None, drawing=None) -> torch.Tensor:
        size = latents.shape[2:]
        x = self.embed(latents)
        embedding = self.embed_scalar(time, "t_embedder")
        if guidance is not None:
            embedding = embedding + self.embed_scalar(guidance, "cfg_embedder")
        modulation = self.linear(F.silu(embedding), "t_block.1")
        text = F.gelu(self.linear(caption, "y_embedder.y_proj.fc1"), approximate="tanh")
        text = rms(self.linear(text, "y_embedder.y_proj.fc2"), self.tensors["attention_y_norm.weight"])
        control = None if drawing is None else self.embed(drawing)
        for index in range(self.depth):
            way_out = f"controlnet.{index - 1}.after_proj"
            if control is not None and f"{way_out}.weight" in self.tensors:
                if index == 1:
                    control = x + self.linear(control, "controlnet.0.before_proj")
                copied = f"controlnet.{index - 1}.copied_block"
                control = self.block(control, text, mask, modulation, size, copied)
                x = x + self.linear(control, way_out)
            x = self.block(x, text, mask, modulation, size, f"blocks.{index}")
        shift, scale = (self.tensors["final_layer.scale_shift_table"] + embedding[:, None]).chunk(2, dim=1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(x, "final_layer.linear").transpose(1, 2).unflatten(2, size)


def transformer_inputs() -> Tensors:
    """Two pictures of 5 x 7 cells; 3 of the first one's 6 text tokens count."""
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, 4, 5, 7, generator=generator),
        "caption": torch.randn(2, 6, 12, generator=generator),
        "time": torch.tensor([0.3, 0.9]),
        "mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]),
    }


def loaded(cls: type, family: Family, state: Tensors) -> torch.nn.Module:
    model = cls(**family.config).eval()
    model.load_state_dict(state, strict=True)
    return model


def run_ours(
    family: Family, state: Tensors, inputs: Tensors, guidance: torch.Tensor | None, residuals=None
) -> torch.Tensor:
    return loaded(SanaTransformer2DModel, family, state)(
        inputs["latents"],
        inputs["caption"],
        inputs["time"],
        guidance=guidance,
        encoder_attention_mask=inputs["mask"],
        controlnet_block_samples=residuals,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("name", ["sana", "teacher", "sana-1.5", "sprint", "sprint-bare"])
@torch.no_grad()
def test_a_converted_transformer_computes_what_the_original_network_does(reduced, name):
    file = reduced(name)
    family, state = converted(file.tensors, file.file_name, cross_attention_head_dim=CROSS_HEAD_DIM)
    guidance = torch.tensor([0.45, 0.1]) if name.startswith("sprint") else None
    inputs = transformer_inputs()
    wanted = OriginalTransformer(file.tensors)(**inputs, guidance=guidance)
    assert difference(run_ours(family, state, inputs, guidance), wanted) < FLOAT32


@torch.no_grad()
def test_the_base_of_a_controlnets_file_computes_what_the_original_network_does(reduced):
    file = reduced("controlnet")
    family, state = converted(file.tensors, kind="transformer", cross_attention_head_dim=CROSS_HEAD_DIM)
    inputs = transformer_inputs()
    wanted = OriginalTransformer(file.tensors)(**inputs)
    assert difference(run_ours(family, state, inputs, None), wanted) < FLOAT32


@pytest.mark.parametrize("placement", ["before", "after"])
@torch.no_grad()
def test_a_converted_controlnet_does_what_the_original_does_if_its_residuals_go_before_blocks(reduced, placement):
    file = reduced("controlnet")
    settings = {"cross_attention_head_dim": CROSS_HEAD_DIM}
    base, base_state = converted(file.tensors, kind="transformer", **settings)
    family, state = converted(file.tensors, kind="controlnet", residual_placement=placement, **settings)
    inputs = transformer_inputs()
    drawing = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(2))
    (residuals,) = loaded(SanaControlNetModel, family, state)(
        inputs["latents"],
        inputs["caption"],
        inputs["time"],
        drawing,
        encoder_attention_mask=inputs["mask"],
        return_dict=False,
    )
    found = run_ours(base, base_state, inputs, None, residuals)
    wanted = OriginalTransformer(file.tensors)(**inputs, drawing=drawing)
    # As diffusers places them, the same weights give another picture.
    assert (difference(found, wanted) < FLOAT32) == (placement == "before")
    assert difference(found, OriginalTransformer(file.tensors)(**inputs)) > 1000 * FLOAT32


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("attn1.to_q.weight", "attn1.to_k.weight"),
        ("attn1.to_k.weight", "attn1.to_v.weight"),
        ("attn2.to_k.weight", "attn2.to_v.weight"),
        ("attn2.to_k.bias", "attn2.to_v.bias"),
        ("attn1.norm_q.weight", "attn1.norm_k.weight"),
        # Not those of attn2: scores are sums of q_c k_c over the channels, so that only the product of the two counts.
    ],
)
@torch.no_grad()
def test_parts_in_another_order_would_be_noticed(reduced, one, another):
    file = reduced("sprint")
    family, state = converted(file.tensors, cross_attention_head_dim=CROSS_HEAD_DIM)
    one, another = f"transformer_blocks.0.{one}", f"transformer_blocks.0.{another}"
    state[one], state[another] = state[another], state[one]
    inputs, guidance = transformer_inputs(), torch.tensor([0.45, 0.1])
    wanted = OriginalTransformer(file.tensors)(**inputs, guidance=guidance)
    assert difference(run_ours(family, state, inputs, guidance), wanted) > 100 * FLOAT32


class OriginalAutoencoder:
    """MIT's network, on a state dict with its own names; how it resamples is told by their shapes."""

    def __init__(self, tensors: Tensors, final_activation: str) -> None:
        self.tensors = tensors
        self.final_activation = getattr(F, final_activation)

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.tensors)

    def convolution(self, x: torch.Tensor, name: str, **options) -> torch.Tensor:
        weight = self.tensors[f"{name}.weight"]
        options = {"padding": weight.shape[-1] // 2, **options}
        return F.conv2d(x, weight, self.tensors.get(f"{name}.bias"), **options)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        if self.has(f"{name}.running_mean") or f"{name}.running_mean" in self.tensors:
            statistics = (self.tensors[f"{name}.running_{what}"] for what in ("mean", "var"))
            return F.batch_norm(x, *statistics, weight, bias)
        return rms(x, weight[:, None, None], bias[:, None, None], dim=1)

    def residual(self, x: torch.Tensor, name: str) -> torch.Tensor:
        # Where it normalises over the batch the original rectifies, elsewhere it uses SiLU.
        activation = F.relu if f"{name}.conv2.norm.running_mean" in self.tensors else F.silu
        hidden = activation(self.convolution(x, f"{name}.conv1.conv"))
        return x + self.norm(self.convolution(hidden, f"{name}.conv2.conv"), f"{name}.conv2.norm")

    def attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        fused = self.convolution(x, f"{name}.qkv.conv")  # B 3C H W
        scales = [fused]
        while self.has(f"{name}.aggreg.{len(scales) - 1}"):
            scale = f"{name}.aggreg.{len(scales) - 1}"
            gathered = self.convolution(fused, f"{scale}.0", groups=fused.shape[1])
            scales.append(self.convolution(gathered, f"{scale}.1", groups=fused.shape[1] // HEAD_DIM))
        # Heads first: each has its query, key and value side by side.
        heads = torch.cat(scales, dim=1).flatten(2).unflatten(1, (-1, 3 * HEAD_DIM))  # B heads 3d N
        attended = relu_attention(*heads.split(HEAD_DIM, dim=2)).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.convolution(attended, f"{name}.proj.conv"), f"{name}.proj.norm")

    def feed_forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        hidden = F.silu(self.convolution(x, f"{name}.inverted_conv.conv"))
        hidden = self.convolution(hidden, f"{name}.depth_conv.conv", groups=hidden.shape[1])
        value, gate = hidden.chunk(2, dim=1)
        projected = self.convolution(value * F.silu(gate), f"{name}.point_conv.conv")
        return x + self.norm(projected, f"{name}.point_conv.norm")

    def block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.has(f"{name}.main.conv1"):
            return self.residual(x, f"{name}.main")
        return self.feed_forward(self.attention(x, f"{name}.context_module.main"), f"{name}.local_module.main")

    def is_resampling(self, name: str) -> bool:
        return self.has(f"{name}.main.conv")

    def down(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Strided, or (one level deeper) a convolution and pixel unshuffle; shortcut: means of unshuffled channels."""
        if self.has(f"{name}.conv"):
            return F.pixel_unshuffle(self.convolution(x, f"{name}.conv"), 2)
        return self.convolution(x, name, stride=2)

    def up(self, x: torch.Tensor, name: str, channels: int) -> torch.Tensor:
        """Nearest neighbour and a convolution, or one with four times the rows and pixel shuffle."""
        if self.tensors[f"{name}.conv.weight"].shape[0] == 4 * channels:
            return F.pixel_shuffle(self.convolution(x, f"{name}.conv"), 2)
        return self.convolution(F.interpolate(x, scale_factor=2, mode="nearest"), f"{name}.conv")

    def operations(self, stage: str) -> list[str]:
        count = 0
        while self.has(f"{stage}.op_list.{count}"):
            count += 1
        return [f"{stage}.op_list.{index}" for index in range(count)]

    def encode(self, x: torch.Tensor, stages: int) -> torch.Tensor:
        stem = "encoder.project_in.conv"
        x = self.down(x, stem) if self.has(f"{stem}.conv") else self.convolution(x, stem)
        for stage in range(stages):
            for name in self.operations(f"encoder.stages.{stage}"):
                if not self.is_resampling(name):
                    x = self.block(x, name)
                    continue
                y = self.down(x, f"{name}.main.conv")
                shortcut = F.pixel_unshuffle(x, 2)
                x = y + shortcut.unflatten(1, (y.shape[1], -1)).mean(2)
        y = self.convolution(x, "encoder.project_out.main.op_list.0.conv")
        return y + x.unflatten(1, (y.shape[1], -1)).mean(2)

    def decode(self, latents: torch.Tensor, stages: int, widths: tuple[int, ...]) -> torch.Tensor:
        x = self.convolution(latents, "decoder.project_in.main.conv")
        x = x + latents.repeat_interleave(x.shape[1] // latents.shape[1], dim=1)
        for stage in reversed(range(stages)):
            for name in self.operations(f"decoder.stages.{stage}"):
                if not self.is_resampling(name):
                    x = self.block(x, name)
                    continue
                shortcut = x.repeat_interleave(4 * widths[stage] // x.shape[1], dim=1)
                x = self.up(x, f"{name}.main.conv", widths[stage]) + F.pixel_shuffle(shortcut, 2)
        x = self.final_activation(self.norm(x, "decoder.project_out.op_list.0"))
        head = "decoder.project_out.op_list.2.conv"
        return self.up(x, head, 3) if self.has(f"{head}.conv") else self.convolution(x, head)


def load_autoencoder(file) -> tuple[AutoencoderDC, OriginalAutoencoder]:
    family, state = converted(file.tensors, file.file_name)
    model = AutoencoderDC(**family.config).eval()
    model.load_state_dict(state, strict=True)
    return model, OriginalAutoencoder(file.tensors, "silu" if file.name == "dc-ae-lite" else "relu")


@pytest.mark.parametrize("name", ["dc-ae-sana", "dc-ae-lite", "dc-ae-f32", "dc-ae-f64", "dc-ae-f128"])
@torch.no_grad()
def test_a_converted_autoencoder_computes_what_the_original_network_does(reduced, name):
    model, original = load_autoencoder(reduced(name))
    ratio, widths = model.spatial_compression_ratio, model.config.decoder_block_out_channels
    pixels = torch.randn(1, 3, 2 * ratio, 3 * ratio, generator=torch.Generator().manual_seed(1))
    latents = original.encode(pixels, stages=len(widths))
    assert difference(model.encode(pixels).latent, latents) < FLOAT32
    pixels = original.decode(latents, len(widths), widths)
    assert difference(model.decode(latents).sample, pixels) < FLOAT32


@torch.no_grad()
def test_the_thirds_of_the_autoencoders_qkv_are_not_query_key_and_value(reduced):
    # The trap of this layout: were they taken for such, two heads and more would give another picture.
    model, original = load_autoencoder(reduced("dc-ae-sana"))
    name, attention = "encoder.stages.5.op_list.0.context_module.main", model.encoder.down_blocks[5][0].attn
    x = torch.randn(1, 64, 4, 5, generator=torch.Generator().manual_seed(1))
    wanted = original.attention(x, name)
    assert difference(attention(x), wanted) < FLOAT32
    fused = original.tensors[f"{name}.qkv.conv.weight"]
    by_head = fused.unflatten(0, (-1, 3, HEAD_DIM)).transpose(0, 1).reshape(fused.shape)
    original.tensors[f"{name}.qkv.conv.weight"] = by_head
    assert difference(attention(x), original.attention(x, name)) > 100 * FLOAT32
