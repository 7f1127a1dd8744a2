"""Bytes counted without weights against bytes of the real networks."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import BitsAndBytesConfig
from transformers import Gemma2Model

from sana_sprint import (
    AutoencoderDC,
    SanaControlNetModel,
    SanaSprintControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    SanaTransformer2DModel,
    embedded_checkpoint,
)
from sana_sprint.memory.configs import PUBLISHED, PipelineConfigs, controlnet_class, read_configs, read_controlnet
from sana_sprint.memory.stages import (
    INSTRUCTION_TOKENS,
    Networks,
    Workload,
    count,
    largest_layer_bytes,
    streamed_bytes,
    unpacked_bytes,
    weight_bytes,
)
from sana_sprint.memory.tracker import PeakBytes
from sana_sprint.text.prefix import read_behind, read_prefix

CONFIGS = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}}


KINDS = ("after", "before", "both")


@pytest.fixture
def controlled(small, control_folders):
    """The same networks with a ControlNet: one of the folders by its name, or a number of blocks."""

    def networks(control: str | int) -> Networks:
        found = control if isinstance(control, int) else read_controlnet(control_folders[control])
        return Networks(replace(small.configs, controlnet=found), small.workload)

    return networks


def numbers_of(model: torch.nn.Module) -> int:
    """Bytes of a quantised model: without what describes the codes, some hundred bytes a layer; with the positions."""
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    described = ("quant_map", "bitsandbytes__", "weight_format")
    found = sum(size for name, size in sizes.items() if not any(part in name for part in described))
    return found + 2 * sum(buffer.numel() for buffer in model.buffers())  # which are in no state dict


def test_published_models_have_their_published_numbers_of_parameters():
    # As in tests/conformance/test_published_sizes.py, in two bytes each.
    expected = {"1.6B": (1_610_237_472, 312_250_275), "0.6B": (593_501_216, 312_250_275)}
    for name in PUBLISHED:
        networks = Networks(read_configs(name), Workload())
        counts = tuple(sum(p.numel() for p in part.parameters()) for part in (networks.transformer, networks.vae))
        assert counts == next(expected[size] for size in expected if size in name)
        assert networks.configs.picture_size == 1024


def test_weights_of_sixteen_bits_are_those_of_the_checkpoint(small, transformer):
    numbers = [*transformer.parameters(), *transformer.buffers()]
    assert weight_bytes(small.transformer) == 2 * sum(tensor.numel() for tensor in numbers)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_take_what_was_counted(bits, small):
    model = SanaTransformer2DModel.from_pretrained(
        embedded_checkpoint(),
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**CONFIGS[bits]),
    )
    assert weight_bytes(small.transformer, bits) == numbers_of(model)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_controlnets_take_what_was_counted(kind, bits, controlled, control_folders):
    model = controlnet_class(read_controlnet(control_folders[kind])).from_pretrained(
        control_folders[kind], torch_dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**CONFIGS[bits])
    )
    assert weight_bytes(controlled(kind).controlnet, bits) == numbers_of(model)


@torch.no_grad()
def test_a_step_and_a_decode_take_what_was_counted(small, transformer):
    config = transformer.config
    text = torch.zeros(1, 300, config.caption_channels, dtype=torch.bfloat16)
    ones = torch.ones(1, dtype=torch.bfloat16)
    latents = torch.zeros(1, config.in_channels, 8, 8, dtype=torch.bfloat16)
    with PeakBytes() as step:
        transformer(latents, encoder_hidden_states=text, timestep=ones, guidance=ones)
    vae = AutoencoderDC.from_pretrained(embedded_checkpoint(), subfolder="vae", torch_dtype=torch.bfloat16)
    with PeakBytes() as decode:
        vae.decode(latents)
    # The library's convolutions choose their memory format, which costs a copy here and there.
    assert small.denoise_bytes == pytest.approx(step.peak, rel=0.05)
    assert small.decode_bytes() == pytest.approx(decode.peak, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_controlnets_takes_what_was_counted(kind, controlled, control_folders, small):
    pipe = SanaSprintControlNetPipeline.from_pretrained(
        embedded_checkpoint(),
        torch_dtype=torch.bfloat16,
        controlnet=controlnet_class(read_controlnet(control_folders[kind])).from_pretrained(
            control_folders[kind], torch_dtype=torch.bfloat16
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    counts: list[PeakBytes] = []
    step = pipe.flow_velocity

    def counted_step(*arguments: object) -> torch.Tensor:
        with PeakBytes() as steps:
            counts.append(steps)
            return step(*arguments)

    pipe.flow_velocity = counted_step
    text = torch.zeros(1, 300, 128, dtype=torch.bfloat16), torch.ones(1, 300, dtype=torch.long)
    drawing = torch.rand(1, 3, 64, 64)
    pipe(
        prompt_embeds=text[0],
        prompt_attention_mask=text[1],
        control_image=[drawing] * 2 if kind == "both" else drawing,
        num_inference_steps=1,
        output_type="latent",
    )
    networks = controlled(kind)
    assert networks.denoise_bytes == pytest.approx(counts[0].peak, rel=0.05)  # casts and masks
    assert networks.denoise_bytes > small.denoise_bytes
    assert (networks.encode_bytes, networks.decode_bytes()) == (small.encode_bytes, small.decode_bytes())


def test_a_number_of_blocks_stands_for_a_controlnet_that_copies_so_many(controlled, transformer):
    networks = controlled(3)
    copied = SanaControlNetModel.from_transformer(transformer, num_layers=3)
    assert weight_bytes(networks.controlnet) == weight_bytes(copied)
    assert controlled(1).denoise_bytes == controlled("after").denoise_bytes < networks.denoise_bytes
    with pytest.raises(ValueError, match="num_layers must be from 1 to 5 for a transformer of 6 blocks, got 6"):
        assert controlled(6).controlnet


def test_a_controlnet_that_was_made_for_another_transformer_is_refused(controlled, control_folders, sprint):
    configs = replace(sprint.configs, controlnet=read_controlnet(control_folders["after"]))
    with pytest.raises(ValueError, match="controlnet must have the transformer's in_channels=32, got 16"):
        assert Networks(configs, sprint.workload).controlnet


def test_a_picture_is_encoded_where_a_call_starts_from_one_or_follows_a_drawing(small, controlled):
    starting = Networks(small.configs, replace(small.workload, starts_from_picture=True))
    assert [*small.stage_bytes()] == ["encode", "denoise", "decode"]
    for networks in (starting, controlled("after")):
        assert [*networks.stage_bytes()] == ["encode picture", "encode", "denoise", "decode"]
        assert networks.stage_bytes()["encode picture"] == small.encode_picture_bytes()


def test_encoding_a_picture_takes_what_was_counted(small):
    pipe = SanaSprintImg2ImgPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=torch.bfloat16)
    picture = torch.rand(1, 3, 64, 64)
    with PeakBytes() as encode:
        pipe.encode_image(picture)
    assert small.encode_picture_bytes() == pytest.approx(encode.peak, rel=0.05)  # as for a decode


def test_large_pictures_are_encoded_in_strips(small):
    networks = Networks(small.configs, replace(small.workload, height=512, width=256, batch_size=2))
    in_strips = networks.encode_picture_bytes()
    whole = Networks(networks.configs, networks.workload)
    whole.vae.disable_strips()
    assert in_strips < whole.encode_picture_bytes() / 2


@torch.no_grad()
def test_reading_takes_what_was_counted_of_the_instruction_and_the_prompts_behind_it(small):
    text_encoder = Gemma2Model.from_pretrained(embedded_checkpoint(), subfolder="text_encoder", dtype=torch.bfloat16)
    instruction, prompt = torch.zeros(1, INSTRUCTION_TOKENS, dtype=torch.long), torch.ones(1, 300, dtype=torch.long)
    with PeakBytes() as reading:
        prefix = read_prefix(text_encoder, instruction)
        read_behind(text_encoder, prefix, prompt, prompt)
    kept = [prefix.states, *(part for layer in prefix.keys_and_values.layers for part in (layer.keys, layer.values))]
    assert small.encode_bytes == pytest.approx(reading.peak, rel=0.05)  # masks differ by a copy here and there
    assert small.kept_bytes == pytest.approx(sum(tensor.nbytes for tensor in kept), rel=1e-3)  # and a number or two


@pytest.mark.parametrize(("height", "width"), [(512, 512), (768, 256), (192, 768)])
def test_two_tiles_are_enough_to_know_what_all_of_them_take(height, width, small):
    large = Networks(small.configs, replace(small.workload, height=height, width=width, batch_size=2))
    latents = torch.empty(2, large.vae.config.latent_channels, height // 8, width // 8, device="meta").bfloat16()
    large.vae.enable_tiling(256, 256)
    whole = count(lambda: large.vae.decode(latents)).peak
    # Their blending weights are one row for each tile.
    assert large.decode_bytes(256) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (768, 256), (192, 768)])
def test_two_tiles_are_enough_to_know_what_encoding_all_of_them_takes(height, width, small):
    large = Networks(small.configs, replace(small.workload, height=height, width=width, batch_size=2))
    pixels = torch.empty(2, 3, height, width, device="meta").bfloat16()
    large.vae.enable_tiling(256, 256)
    whole = count(lambda: large.vae.encode(pixels)).peak
    assert large.encode_picture_bytes(256) == pytest.approx(whole + pixels.nbytes, rel=1e-3)  # as above


def test_larger_pictures_and_batches_take_more_and_tiles_less(small):
    large = Networks(small.configs, replace(small.workload, height=256, width=512, batch_size=2))
    assert large.encode_bytes > small.encode_bytes
    assert large.encode_picture_bytes() > large.encode_picture_bytes(64) > small.encode_picture_bytes()
    assert large.denoise_bytes > 16 * small.denoise_bytes
    assert large.decode_bytes() > large.decode_bytes(64) > small.decode_bytes()


def test_sizes_between_the_cells_of_the_latents_are_rounded_up(small):
    odd, even = (Networks(small.configs, replace(small.workload, height=height)) for height in (97, 104))
    assert odd.decode_bytes() == even.decode_bytes() > small.decode_bytes()
    assert odd.encode_picture_bytes() == even.encode_picture_bytes() > small.encode_picture_bytes()


def test_under_group_offload_there_are_two_blocks_and_what_is_in_no_block(small):
    blocks = [weight_bytes(block) for block in small.transformer.transformer_blocks]
    assert streamed_bytes(small.transformer) == weight_bytes(small.transformer) - sum(blocks) + 2 * blocks[0]


def test_layers_that_come_and_go_by_themselves_take_as_much_as_the_largest(small):
    largest = max(small.vae.modules(), key=lambda layer: 0 if any(layer.children()) else weight_bytes(layer))
    assert largest_layer_bytes(small.vae) == sum(parameter.numel() * 2 for parameter in largest.parameters())


def test_four_bits_unpack_one_matrix_at_a_time(small):
    largest = max(p.numel() for name, p in small.transformer.named_parameters() if "conv_inverted.weight" in name)
    assert unpacked_bytes(small.transformer, 4) == 2 * largest
    assert unpacked_bytes(small.transformer, 8) == unpacked_bytes(small.transformer, 16) == 0


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "quanto", "weights_dtype": "int8"}, 8),
        ({"quant_method": "quanto", "weights_dtype": "int4"}, 4),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, 4),
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "of tomorrow"}, 16),
    ],
)
def test_bits_of_a_quantised_checkpoint_are_those_that_its_config_names(settings, bits):
    configs = PipelineConfigs({"quantization_config": settings}, {}, None)
    assert configs.stored_bits() == {"transformer": bits}


def test_networks_are_gone_with_the_last_who_asked_them():
    networks = Networks(read_configs(embedded_checkpoint()), Workload(height=64, width=64))
    networks.decode_bytes()
    seen = weakref.ref(networks)
    del networks
    gc.collect()
    assert seen() is None
