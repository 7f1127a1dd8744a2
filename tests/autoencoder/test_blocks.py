"""The blocks of encoder and decoder: what a config may name, and how the attention regroups its projections."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from sana_sprint.autoencoder import blocks
from sana_sprint.autoencoder.blocks import (
    EfficientViTBlock,
    MultiscaleLinearAttention,
    ResBlock,
    activation,
    make_block,
)
from sana_sprint.layers.attention import linear_attention


@pytest.mark.parametrize("kind", [ResBlock, EfficientViTBlock])
@torch.no_grad()
def test_a_block_of_zero_weights_passes_its_input_on(draw, kind):
    block = make_block(kind.__name__, 16, 8, "rms_norm", "silu", (5,))
    assert type(block) is kind
    for parameter in block.parameters():
        parameter.zero_()
    x = draw(2, 16, 3, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(block(x), x)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("adapted", [[], ["conv1"], ["conv1", "conv2"]], ids=["plain", "one_adapter", "adapters"])
@pytest.mark.parametrize("norm_type", ["rms_norm", "batch_norm"])
def test_inner_rows_of_a_residual_block_are_those_of_the_whole_and_so_are_their_gradients(draw, norm_type, adapted):
    block = ResBlock(8, norm_type, "silu").eval()
    if adapted:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=adapted, init_lora_weights=False), block)
    x = draw(2, 8, 9, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    found, expected = block(x, inner=True), block(x)[:, :, 2:-2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # float32, sums of 72 terms
    pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)), strict=True)
    for pair in pairs:
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)  # sums over 50 pixels of those


@pytest.mark.parametrize("size", [(2, 3), (5, 7)], ids=["few_pixels", "many_pixels"])
@torch.no_grad()
def test_attention_reads_query_key_and_value_per_head_from_the_three_projections(draw, size):
    attention = MultiscaleLinearAttention(16, head_dim=8, kernel_sizes=(), norm_type="rms_norm")
    x = draw(1, 16, *size)
    pixels = x.double().flatten(2).transpose(1, 2)[0]  # N C
    # Rows of the stacked projection: per head 8 of query, 8 of key, 8 of value.
    rows = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]).double().view(2, 3, 8, 16)
    heads = []
    for query, key, value in rows:
        scores = (pixels @ query.T).relu() @ (pixels @ key.T).relu().T
        heads.append(scores / (scores.sum(1, keepdim=True) + 1e-15) @ (pixels @ value.T))
    mixed = torch.cat(heads, dim=1) @ attention.to_out.weight.double().T
    normed = mixed * torch.rsqrt(mixed.square().mean(1, keepdim=True) + 1e-5)
    expected = x + normed.T.unflatten(1, size)[None].float()
    # float32, sums over 35 pixels and 16 channels.
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_b12_every_activation_that_a_config_may_name_exists():
    kinds = {name: type(activation(name)) for name in ("silu", "relu", "relu6", "gelu")}
    assert kinds == {"silu": torch.nn.SiLU, "relu": torch.nn.ReLU, "relu6": torch.nn.ReLU6, "gelu": torch.nn.GELU}


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="activation must be one of gelu, relu, relu6, silu, got 'selu'"):
        activation("selu")
    with pytest.raises(ValueError, match='"ResBlock" or "EfficientViTBlock", got \'ConvBlock\''):
        make_block("ConvBlock", 8, 8, "rms_norm", "silu", ())


@torch.no_grad()
def test_heads_may_attend_one_after_the_other(draw, monkeypatch):
    attention = MultiscaleLinearAttention(32, head_dim=8, kernel_sizes=(5, 3), norm_type="rms_norm")
    x = draw(2, 32, 5, 7)
    expected = attention(x)
    seen: list[int] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append(query.shape[2])
        return linear_attention(query, key, value)

    monkeypatch.setattr(blocks, "linear_attention", attend)
    for most, heads in ((1, [1] * 12), (3 * 2 * 35 * 3 * 8, [3, 1] * 3)):  # two pictures of 35 pixels, three scales
        monkeypatch.setattr(blocks, "MAX_NUMBERS_AT_ONCE", most)
        # float32: batches of fewer matrices.
        torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)
        assert seen == heads
        seen.clear()
