"""The published example and its variants with a tiny pipeline, and what they say on the screen: nothing."""

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import BitsAndBytesConfig as DiffusersBitsAndBytesConfig
from diffusers import PipelineQuantizationConfig, QuantoConfig, TorchAoConfig
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import AutoModel
from transformers import BitsAndBytesConfig as BitsAndBytesConfig
from wide_text import wide_text_encoder

import sana_sprint
from sana_sprint import SanaSprintPipeline, SanaTransformer2DModel, register, unregister
from sana_sprint.quantisation.layers import Pointwise4bit, Pointwise8bit, quantised_layers

SOURCE = Path(sana_sprint.__file__).parents[1]
PROMPT = "a tiny astronaut hatching from an egg on the moon"
# Where there is a GPU, diffusers takes no pipeline to the CPU by name.
DEVICE_MAPS = ["balanced", "cuda" if torch.cuda.is_available() else "cpu", None]


@pytest.fixture(scope="session")
def pipeline_folder(tiny_pipeline_parts, wide_transformer, tmp_path_factory) -> str:
    """The tiny pipeline with a wide transformer, and a text encoder that 4-bit kernels take."""
    text_encoder = wide_text_encoder(len(tiny_pipeline_parts["tokenizer"]))
    transformer = SanaTransformer2DModel.from_config(wide_transformer.config, in_channels=4, out_channels=4)
    parts = {"text_encoder": text_encoder, "transformer": transformer.eval()}
    where = tmp_path_factory.mktemp("quantised") / "pipeline"
    SanaSprintPipeline(**{**tiny_pipeline_parts, **parts}).save_pretrained(where)
    return str(where)


def latents_of(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent").images.float().cpu()


@pytest.fixture(scope="session")
def exact_latents(pipeline_folder) -> torch.Tensor:
    return latents_of(SanaSprintPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.bfloat16))


@pytest.fixture
def library(request):
    """Where the example's two classes come from."""
    if request.param is sana_sprint:
        yield sana_sprint
        return
    register()
    try:
        yield diffusers
    finally:
        unregister()


@pytest.mark.parametrize(
    ("library", "device_map"),
    [*((sana_sprint, device_map) for device_map in DEVICE_MAPS), (diffusers, "balanced")],
    indirect=["library"],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_published_example_draws(pipeline_folder, exact_latents, error_of, library, device_map, tmp_path):
    quant_config = BitsAndBytesConfig(load_in_8bit=True)
    text_encoder_8bit = AutoModel.from_pretrained(
        pipeline_folder,
        subfolder="text_encoder",
        quantization_config=quant_config,
        torch_dtype=torch.bfloat16,
    )

    quant_config = DiffusersBitsAndBytesConfig(load_in_8bit=True)
    transformer_8bit = library.SanaTransformer2DModel.from_pretrained(
        pipeline_folder,
        subfolder="transformer",
        quantization_config=quant_config,
        torch_dtype=torch.bfloat16,
    )

    pipeline = library.SanaSprintPipeline.from_pretrained(
        pipeline_folder,
        text_encoder=text_encoder_8bit,
        transformer=transformer_8bit,
        torch_dtype=torch.bfloat16,
        device_map=device_map,
    )
    assert pipeline(PROMPT).images[0].size == (64, 64)
    assert any(isinstance(layer, Pointwise8bit) for _, layer in quantised_layers(pipeline.transformer))
    found = latents_of(pipeline)
    assert 0 < error_of(found, exact_latents) < 0.05

    pipeline.save_pretrained(tmp_path)
    again = library.SanaSprintPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(latents_of(again), found)


CONFIGS = {
    "all in 8 bits": lambda: PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}),
    "two in 4 bits": lambda: PipelineQuantizationConfig(
        "bitsandbytes_4bit",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        components_to_quantize=["transformer", "text_encoder"],
    ),
    "a mapping": lambda: PipelineQuantizationConfig(
        quant_mapping={
            "transformer": DiffusersBitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
            "text_encoder": BitsAndBytesConfig(load_in_8bit=True),
        }
    ),
}


@pytest.mark.parametrize(("kind", "device_map"), list(zip(CONFIGS, DEVICE_MAPS)))
def test_a_pipeline_is_quantised_as_it_loads(pipeline_folder, exact_latents, error_of, kind, device_map):
    pipe = SanaSprintPipeline.from_pretrained(
        pipeline_folder, quantization_config=CONFIGS[kind](), torch_dtype=torch.bfloat16, device_map=device_map
    )
    pointwise = Pointwise8bit if kind == "all in 8 bits" else Pointwise4bit
    assert any(isinstance(layer, pointwise) for _, layer in quantised_layers(pipe.transformer))
    assert bool(dict(quantised_layers(pipe.vae))) == (kind == "all in 8 bits")
    assert 0 < error_of(latents_of(pipe), exact_latents) < (0.05 if kind == "all in 8 bits" else 0.25)
    assert pipe(PROMPT).images[0].size == (64, 64)


@pytest.mark.parametrize("package", ["torchao", "optimum.quanto"])
def test_a_pipeline_is_quantised_by_another_package_as_it_loads(pipeline_folder, exact_latents, error_of, package):
    pytest.importorskip(package)
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        components = {name: TorchAoConfig(Int8WeightOnlyConfig()) for name in ("transformer", "vae")}
    else:
        # torch's kernel for int8 on the CPU crashes on widths that are no multiple of 16, as the tiny autoencoder's.
        components = {"transformer": QuantoConfig("int8"), "vae": QuantoConfig("float8")}
    config = PipelineQuantizationConfig(quant_mapping=components)
    pipe = SanaSprintPipeline.from_pretrained(pipeline_folder, quantization_config=config, torch_dtype=torch.bfloat16)
    for model in (pipe.transformer, pipe.vae):
        assert any(hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters())
    assert 0 < error_of(latents_of(pipe), exact_latents) < 0.05
    assert pipe(PROMPT).images[0].size == (64, 64)


@pytest.mark.parametrize("kind", ["all in 8 bits", "two in 4 bits"])
def test_an_adapter_of_a_plain_pipeline_serves_a_quantised_one(pipeline_folder, error_of, kind, tmp_path):
    plain, pipe = (
        SanaSprintPipeline.from_pretrained(pipeline_folder, quantization_config=config, torch_dtype=torch.bfloat16)
        for config in (None, CONFIGS[kind]())
    )
    torch.manual_seed(0)
    plain.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "conv_point"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(plain.transformer)
    for name, value in layers.items():
        value.mul_(4 if "lora_B" in name else 1)
    SanaSprintPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    bound = 0.05 if kind == "all in 8 bits" else 0.25
    base = latents_of(pipe)

    pipe.load_lora_weights(tmp_path, adapter_name="style")
    full = latents_of(pipe)
    assert error_of(full, base) > 0.3
    assert error_of(full, latents_of(plain)) < bound
    pipe.set_adapters("style", 0.5)
    half = latents_of(pipe)
    assert error_of(half, full) > 0.05
    pipe.fuse_lora()
    assert error_of(latents_of(pipe), half) < bound
    pipe.unfuse_lora()
    assert torch.equal(latents_of(pipe), half)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), base)


def test_importing_a_module_of_the_package_says_nothing():
    """In a fresh interpreter, where the module imports bitsandbytes through diffusers."""
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import sana_sprint.training.shapes; import bitsandbytes"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_is_said_of_packages_that_are_not_needed_nor_of_every_product(pipeline_folder):
    """In a fresh interpreter: bitsandbytes speaks when it is imported, and at each product of an 8-bit layer."""
    program = f"""
import sys; sys.path.insert(0, {str(SOURCE)!r})
from sana_sprint import SanaSprintPipeline
import logging, torch
from diffusers import PipelineQuantizationConfig
config = PipelineQuantizationConfig("bitsandbytes_8bit", {{"load_in_8bit": True}})
pipe = SanaSprintPipeline.from_pretrained({pipeline_folder!r}, quantization_config=config, dtype=torch.bfloat16)
pipe("a red circle")
logging.getLogger("bitsandbytes.autograd._functions").warning("something real")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s]" not in line]
    said = [line for line in said if "?it" not in line and "s/it]" not in line]
    assert said == ["something real"]
