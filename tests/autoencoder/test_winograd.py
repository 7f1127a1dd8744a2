"""Winograd's form of a convolution is the plain one up to rounding, and takes its place only where it can."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sana_sprint.assets import embedded_checkpoint
from sana_sprint.autoencoder import winograd
from sana_sprint.autoencoder.blocks import ResBlock
from sana_sprint.autoencoder.inner import InnerConv2d
from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.autoencoder.strips import apply_in_strips
from sana_sprint.autoencoder.winograd import winograd_conv2d, winograd_pays
from sana_sprint.shapes.captions import parse
from sana_sprint.shapes.renderer import render
from sana_sprint.shapes.scenes import complete

CHANNELS, HEIGHT, WIDTH = 8, 12, 16


@pytest.fixture
def in_use(monkeypatch) -> None:
    """From here on the smallest image that it is used for is of the size above, on every processor."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", CHANNELS)
    monkeypatch.setattr(winograd, "MIN_NUMBERS", CHANNELS * HEIGHT * WIDTH)
    monkeypatch.setattr(winograd, "MAX_NUMBERS_AT_ONCE", CHANNELS * 8 * WIDTH)
    monkeypatch.setattr(winograd, "multiplies_bfloat16", lambda: True)


@pytest.fixture
def conv() -> InnerConv2d:
    torch.manual_seed(0)
    return InnerConv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1).requires_grad_(False).bfloat16()


@pytest.fixture
def image(draw) -> torch.Tensor:
    return draw(1, CHANNELS, HEIGHT, WIDTH).bfloat16().contiguous(memory_format=torch.channels_last)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
@pytest.mark.parametrize("channels", [(6, 6), (6, 10), (10, 6)], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (18, 10)], ids=str)
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_it_is_the_plain_convolution(draw, monkeypatch, inner, channels, size, rows_at_once):
    monkeypatch.setattr(winograd, "MAX_NUMBERS_AT_ONCE", rows_at_once * size[1] * max(channels))
    of_input, of_result = channels
    x = draw(2, of_input, size[0] + (2 if inner else 0), size[1]).double()
    weight = draw(of_result, of_input, 3, 3, seed=1).double()
    bias = draw(of_result, seed=2).double()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for shift in (None, bias):
            y = winograd_conv2d(x.contiguous(memory_format=memory_format), weight, shift, inner)
            expected = F.conv2d(x, weight, shift, padding=(0, 1) if inner else 1)
            assert relative_error(y, expected) < 1e-6  # the kernel's sums are made in float32
            assert y.shape == expected.shape
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_in_bfloat16_it_has_four_times_the_error_of_the_plain_form(draw):
    x = F.silu(draw(1, 64, 32, 32)).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = draw(64, 64, 3, 3, seed=1).bfloat16()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    plain = relative_error(F.conv2d(x, weight, padding=1), exact)
    assert 3.5 * plain < relative_error(winograd_conv2d(x, weight), exact) < 4.5 * plain


@torch.no_grad()
def test_a_convolution_is_computed_so_and_with_the_weights_it_has_then(in_use, conv, image):
    for x, inner in ((image, False), (F.pad(image, (0, 0, 1, 1)), True)):
        assert torch.equal(conv(x, inner), winograd_conv2d(x, conv.weight, conv.bias, inner))
    before = conv(image)
    conv.weight.mul_(-2)
    conv.bias.mul_(-2)
    assert torch.equal(conv(image), -2 * before)


def test_it_is_not_used_where_it_cannot_be_or_would_be_slower(in_use, conv, image):
    weight, bias = conv.weight, conv.bias
    larger = torch.cat([image] * 2, 2)
    assert winograd_pays(image, weight, bias, inner=False)
    assert winograd_pays(larger, weight, bias, inner=True)
    others = {
        "float32": (image.float(), weight.float(), bias.float(), False),
        "bias in float32": (image, weight, bias.float(), False),
        "small": (image[:, :, 2:], weight, bias, False),
        "small, inner": (image, weight, bias, True),
        "narrow": (larger[:, : CHANNELS // 2], weight[:, : CHANNELS // 2], bias, False),
        "few results": (image, weight[: CHANNELS // 2], bias[: CHANNELS // 2], False),
        "odd width": (larger[..., 1:], weight, bias, False),
        "odd height": (larger[:, :, 1:], weight, bias, False),
        "another kernel": (image, weight[..., :1, :1], bias, False),
        "groups": (image, weight[:, :1], bias, False),
        "no batch": (image[0], weight, bias, False),
        "meta": (image.to("meta"), weight.to("meta"), bias.to("meta"), False),
        "gradient": (image.clone().requires_grad_(), weight, bias, False),
        "gradient of the weight": (image, weight.clone().requires_grad_(), None, False),
    }
    assert [name for name, case in others.items() if winograd_pays(*case)] == []
    with torch.no_grad():
        assert winograd_pays(*others["gradient"])


def test_a_processor_says_whether_it_multiplies_bfloat16():
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    expected = bool(can.get("avx512_bf16") and not can.get("amx_bf16"))
    assert winograd.multiplies_bfloat16() is expected


@torch.no_grad()
def test_a_residual_block_in_strips_is_computed_so_with_little_more_than_twice_the_error(in_use, monkeypatch, draw):
    torch.manual_seed(0)
    block = ResBlock(CHANNELS, "rms_norm", "silu").eval()
    x = draw(1, CHANNELS, 2 * HEIGHT + 2, 2 * WIDTH)
    exact = block(x)
    block.bfloat16()
    used = []
    monkeypatch.setattr(winograd, "_sum_weights", lambda w, form=winograd._sum_weights: used.append(w) or form(w))
    in_strips = apply_in_strips([block], x.bfloat16().contiguous(memory_format=torch.channels_last), HEIGHT)
    assert used
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1000)
    plain = block(x.bfloat16())
    # The activation, the norm and the sum with the input round alike in both.
    assert relative_error(in_strips, exact) < 2.5 * relative_error(plain, exact)


@torch.no_grad()
def test_trained_weights_decode_pictures_to_half_a_level_with_it_in_every_convolution(in_use, monkeypatch):
    model = AutoencoderDC.from_pretrained(embedded_checkpoint() / "vae").eval()
    captions = ("a yellow circle above a blue square", "two green squares on a white background", "a yellow star")
    scenes = [complete(parse(caption), np.random.default_rng(seed)) for seed, caption in enumerate(captions)]
    pictures = torch.stack([torch.from_numpy(render(scene)) for scene in scenes]).movedim(-1, 1) / 127.5 - 1
    latents = model.encode(pictures).latent.bfloat16()
    exact = model.decode(latents.float()).sample
    model.bfloat16()
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_NUMBERS", 1)
    error = model.decode(latents).sample - exact
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1000)
    plain_error = model.decode(latents).sample - exact
    levels = [127.5 * of.square().mean().sqrt().item() for of in (plain_error, error)]
    assert 0.1 < levels[0] < levels[1] < 0.5


@torch.no_grad()
def test_an_adapter_of_many_ranks_around_a_convolution_is_added_to_it(in_use, conv, image):
    model = nn.Sequential(conv)
    expected = conv(image)
    inject_adapter_in_model(LoraConfig(r=CHANNELS, target_modules=["0"], init_lora_weights=False), model)
    model.bfloat16()
    added = model(image) - expected
    layer = model[0]
    through = F.conv2d(F.conv2d(image, layer.lora_A.default.weight, padding=1), layer.lora_B.default.weight)
    # A difference of two rounded numbers, and the form of the first of both convolutions.
    assert relative_error(added, through.double() * layer.scaling["default"]) < 0.05


@torch.no_grad()
def test_compiled_it_is_the_plain_form_for_images_of_all_sizes(in_use, conv, image):
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (image, image[..., 1:], image[:, :, 2:], torch.cat([image] * 2, 2)):
        assert torch.equal(compiled(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
