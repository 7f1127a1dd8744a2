"""The transformer loaded in 8 and 4 bits: what is quantised, by every way of loading, saved, refused, and undone."""

import json
import threading

import pytest
import torch
from diffusers import BitsAndBytesConfig
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as TheirTransformer
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import replace_with_bnb_linear
from safetensors import safe_open
from torch import nn

from sana_sprint import SanaTransformer2DModel, register, unregister
from sana_sprint.layers.feed_forward import PointwiseConv2d
from sana_sprint.quantisation.layers import quantised_layers
from sana_sprint.quantisation.quantisers import EXACT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to quantise on")

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def names_of(layers) -> set[str]:
    return {name for name, _ in layers}


def keys_on_disk(folder) -> dict[str, list[int]]:
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # no dictionary


def test_every_matrix_product_of_the_blocks_is_quantised_and_nothing_else(load, wide_transformer, config):
    products = {
        name
        for name, module in wide_transformer.named_modules()
        if isinstance(module, (nn.Linear, PointwiseConv2d)) and name.startswith("transformer_blocks.")
    }
    model = load(quantization_config=config)
    assert names_of(quantised_layers(model)) == products
    assert {name.rpartition(".")[2] for name in products} == {
        *("to_q", "to_k", "to_v", "0"),  # "0" is to_out.0
        *("conv_inverted", "conv_point"),
    }
    rest = {name: value for name, value in model.named_parameters() if name.removesuffix(".weight") not in products}
    expected = dict(wide_transformer.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in rest.items())


def test_weights_take_the_bytes_they_should(load, config):
    model = load(quantization_config=config)
    per_weight = 1 if config.load_in_8bit else 0.5
    for name, layer in quantised_layers(model):
        assert layer.weight.data.nbytes == per_weight * layer.in_features * layer.out_features, name


def test_the_velocity_is_as_near_as_with_diffusers_fewer_quantised_layers(
    load, wide_transformer, velocity, error_of, config
):
    """diffusers replaces linear layers alone, but those of time, caption and output too; here it is done by hand."""
    exact = velocity(wide_transformer)
    theirs = TheirTransformer.from_config(wide_transformer.config).eval().to(torch.bfloat16)
    weights = wide_transformer.state_dict()
    with torch.device("meta"):
        replace_with_bnb_linear(theirs, modules_to_not_convert=[], quantization_config=config)
    for name, module in theirs.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            kind, settings = type(parameter), parameter.__dict__
            value = weights[f"{name}.{key}" if name else key].clone()
            new = kind(value, requires_grad=False, **settings).to("cpu")
            module._parameters[key] = new
    ours, others = error_of(velocity(load(quantization_config=config)), exact), error_of(velocity(theirs), exact)
    assert 0 < ours < (0.03 if config.load_in_8bit else 0.25)
    assert ours < 1.2 * others


WAYS = [
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}},
    {"low_cpu_mem_usage": True},
    {"disable_mmap": True},
]
WITHOUT_GPU = [
    {"device_map": "auto"},
    {"device_map": "balanced", "max_memory": {"cpu": "1GB"}},
    {"device_map": {"transformer_blocks": "cpu", "": "cpu"}},
]


@pytest.mark.parametrize("options", [*WAYS, *(pytest.param(way, marks=needs_none) for way in WITHOUT_GPU)], ids=str)
def test_every_way_of_loading_gives_the_same_model(load, velocity, equal_states, config, options):
    expected = load(quantization_config=config, device_map={"": torch.device("cpu")})
    model = load(quantization_config=config, **options)
    assert equal_states(model, expected)
    assert torch.equal(velocity(model), velocity(expected))


@pytest.mark.parametrize("options", [{"max_shard_size": "100KB"}, {"safe_serialization": False}], ids=str)
def test_shards_and_pickles_are_quantised_like_one_file(
    wide_transformer, load, equal_states, config, tmp_path, options
):
    wide_transformer.save_pretrained(tmp_path, **options)
    assert equal_states(load(tmp_path, quantization_config=config), load(quantization_config=config))


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("size", ["10GB", "50KB"])
def test_a_saved_folder_is_the_same_model(load, velocity, equal_states, config, tmp_path, has_run, size):
    model = load(quantization_config=config)
    if has_run:
        velocity(model)
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = load(tmp_path)
    assert names_of(quantised_layers(again)) == names_of(quantised_layers(model))
    assert equal_states(again, model)
    assert torch.equal(velocity(again), velocity(model))


def test_pointwise_weights_keep_their_shape_on_disk_in_8_bits(load, wide_transformer, tmp_path):
    load(quantization_config=EIGHT).save_pretrained(tmp_path)
    shapes = keys_on_disk(tmp_path)
    for key, value in wide_transformer.state_dict().items():
        assert shapes[key] == list(value.shape), key


def test_plain_and_quantised_state_dicts_load_into_a_quantised_model(
    load, wide_transformer, velocity, equal_states, config
):
    model, expected = load(quantization_config=config), load(quantization_config=config)
    model.load_state_dict({key: torch.zeros_like(value) for key, value in wide_transformer.state_dict().items()})
    assert not equal_states(model, expected)
    model.load_state_dict(wide_transformer.state_dict())
    assert equal_states(model, expected)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(velocity(model), velocity(expected))


@pytest.mark.parametrize(
    "skipped", [["conv_inverted", "conv_point"], ["transformer_blocks.1"], ["attn2.to_k"]], ids=str
)
def test_what_a_config_names_is_skipped_beside_what_is_exact(load, config, skipped):
    config.llm_int8_skip_modules = list(skipped)
    found = names_of(quantised_layers(load(quantization_config=config)))
    config.llm_int8_skip_modules = None
    everything = names_of(quantised_layers(load(quantization_config=config)))
    assert found == {name for name in everything if not any(part in name for part in skipped)}
    assert found


def test_a_callers_config_stays_as_it_was_and_the_saved_one_says_what_was_left(load, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["attn2"])
    load(quantization_config=config).save_pretrained(tmp_path)
    assert config.llm_int8_skip_modules == ["attn2"]
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["llm_int8_skip_modules"] == [*EXACT, "attn2"]


def test_a_folder_in_which_diffusers_has_quantised_every_linear_layer_loads(load, velocity, config, tmp_path):
    """Written by hand as diffusers would: time, caption and output in 8 or 4 bits too, the convolutions not."""
    wide = load(dtype=torch.bfloat16)
    linears = {name for name, module in wide.named_modules() if isinstance(module, nn.Linear)}
    with torch.device("meta"):
        model = SanaTransformer2DModel.from_config(wide.config)
        replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = wide.state_dict()[f"{name}.{key}" if name else key]
            module._parameters[key] = type(parameter)(value, requires_grad=False, **parameter.__dict__).to("cpu")
    model.register_to_config(quantization_config=config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert names_of(quantised_layers(again)) == linears
    assert torch.isfinite(velocity(again)).all()
    assert velocity(again).std() > 0


def test_a_dequantised_model_is_an_ordinary_one(load, velocity, wide_transformer, error_of, config, tmp_path):
    model = load(quantization_config=config)
    quantised = velocity(model)
    model.dequantize()
    assert not names_of(quantised_layers(model))
    assert {type(module) for module in model.modules()} == {type(module) for module in wide_transformer.modules()}
    assert model.state_dict().keys() == wide_transformer.state_dict().keys()
    # The same weights; in 8 bits the activations are no longer rounded, in 4 the products may be of another dtype.
    assert error_of(velocity(model), quantised) < 0.02
    model.save_pretrained(tmp_path)
    assert torch.equal(velocity(load(tmp_path)), velocity(model))
    model.to(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_quantised_model_moves_but_is_not_cast(load, velocity, config):
    model = load(quantization_config=config)
    expected = velocity(model)
    assert torch.equal(velocity(model.to("cpu")), expected)
    with pytest.raises(ValueError, match="use the `torch_dtype` argument when loading"):
        model.to(torch.float32)


@needs_none
def test_on_the_cpu_what_is_not_quantised_is_bfloat16_where_nothing_else_is_asked_for(load):
    assert load(quantization_config=EIGHT, torch_dtype=None).proj_out.weight.dtype == torch.bfloat16


@needs_none
def test_what_cannot_work_without_a_gpu_is_refused(load, tmp_path):
    halves = {"transformer_blocks.0": "disk", "": "cpu"}
    with pytest.raises(ValueError, match=r"cannot lie on disk, and transformer_blocks\.0 would"):
        load(quantization_config=EIGHT, device_map=halves, offload_folder=tmp_path)
    with pytest.raises(RuntimeError, match="No GPU found"):
        load(quantization_config=EIGHT, device_map="cuda")
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        load(quantization_config=EIGHT, low_cpu_mem_usage=False)


def test_quantising_nothing_is_said(load, caplog):
    everything = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["transformer_blocks"])
    load(quantization_config=everything)
    assert "no layer of SanaTransformer2DModel is quantised" in caplog.text


@needs_none
def test_diffusers_own_classes_are_quantised_as_before(folder, load):
    before = dict(AUTO_QUANTIZER_MAPPING)
    load(quantization_config=EIGHT)
    with pytest.raises(OSError, match="config.json"):
        load("nowhere", quantization_config=EIGHT)
    assert before == AUTO_QUANTIZER_MAPPING
    with pytest.raises(RuntimeError, match="No GPU found"):
        TheirTransformer.from_pretrained(folder, quantization_config=EIGHT)


@needs_none
def test_another_thread_has_diffusers_quantisers_while_ours_loads(folder, load, monkeypatch):
    """The other thread loads when ours is about to read its config."""
    errors = []
    read_config = SanaTransformer2DModel.load_config

    def load_theirs() -> None:
        try:
            TheirTransformer.from_pretrained(folder, quantization_config=EIGHT)
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(*args, **kwargs):
        thread = threading.Thread(target=load_theirs)
        thread.start()
        thread.join()
        return read_config(*args, **kwargs)

    monkeypatch.setattr(SanaTransformer2DModel, "load_config", meanwhile)
    assert names_of(quantised_layers(load(quantization_config=EIGHT)))
    assert errors == ["No GPU found. A GPU is needed for quantization."]


def test_registered_classes_quantise_like_ours(folder, load, equal_states):
    register()
    try:
        from diffusers import AutoModel

        model = AutoModel.from_pretrained(str(folder), quantization_config=NF4, dtype=torch.bfloat16)
    finally:
        unregister()
    assert isinstance(model, SanaTransformer2DModel)
    assert equal_states(model, load(quantization_config=NF4))


@pytest.mark.cuda
@needs_gpu
def test_a_gpu_gives_nearly_what_the_cpu_gives_and_saves_the_same_model(
    load, velocity, error_of, equal_states, config, tmp_path
):
    on_cpu = velocity(load(quantization_config=config, device_map="cpu"))
    model = load(quantization_config=config)
    assert model.device.type == "cuda"
    # Two devices add in two orders and round to bfloat16, a few dozen times.
    assert error_of(velocity(model).cpu(), on_cpu) < 0.03
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device_map="auto")
    assert equal_states(again, model)
    assert torch.equal(velocity(again), velocity(model))


@pytest.mark.cuda
@needs_gpu
def test_a_model_quantised_and_run_on_the_cpu_moves_to_the_gpu(load, velocity, error_of, config):
    model = load(quantization_config=config, device_map={"": "cpu"})
    on_cpu = velocity(model)
    assert error_of(velocity(model.to("cuda")).cpu(), on_cpu) < 0.03
