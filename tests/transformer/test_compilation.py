"""torch.compile: no graph breaks, whatever the size; and the repeated blocks alone."""

from typing import Any

import pytest
import torch

from sana_sprint.text.encoder import drop_padding

CROSS_ATTENTION = ("attn2.to_kv.weight", "attn2.to_kv.bias")
SAME: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # float32, the same operations


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_the_transformer_compiles_without_a_graph_break(make_transformer, inputs):
    model = make_transformer(num_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs["encoder_attention_mask"] = None
    torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, **SAME)


@torch.no_grad()
def test_one_dynamic_graph_serves_all_sizes(make_transformer, inputs):
    model, graphs = make_transformer(num_layers=1, interpolation_scale=1.0), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for size in ((5, 9), (8, 5), (3, 11)):
        inputs["hidden_states"] = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, **SAME)
    assert len(graphs) == 1


def test_a_training_step_compiles_without_a_graph_break(make_transformer, inputs):
    model = make_transformer(num_layers=1)
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).sample.square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **SAME, msg=name)


@torch.no_grad()
def test_b15_the_repeated_blocks_compile_by_themselves(make_transformer, inputs):
    model = make_transformer(num_layers=3)
    expected, graphs = model(**inputs).sample, []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model.compile_repeated_blocks(fullgraph=True, backend=count)
    torch.testing.assert_close(model(**inputs).sample, expected, **SAME)
    assert len(graphs) == 1  # three blocks, one graph


@pytest.mark.parametrize("compiles", ["compile", "compile_repeated_blocks"])
@torch.no_grad()
def test_other_times_and_other_texts_of_a_padded_length_need_no_other_code(make_transformer, inputs, compiles):
    model = make_transformer(num_layers=2)
    calls = []
    for time, length in ((0.9, 7), (0.5, 2), (0.1, 5)):
        text, mask = inputs["encoder_hidden_states"][:, :length], torch.ones(2, length, dtype=torch.long)
        call = {**inputs, "timestep": torch.tensor([time, time])}
        expected = model(**{**call, "encoder_hidden_states": text, "encoder_attention_mask": None}).sample
        embeds, mask = drop_padding(text, mask, lengths=(8,))
        calls.append(({**call, "encoder_hidden_states": embeds, "encoder_attention_mask": mask}, expected))
    getattr(model, compiles)(fullgraph=True, backend="eager")
    for index, (call, expected) in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            torch.testing.assert_close(model(**call).sample, expected, **SAME)


@torch.no_grad()
def test_fused_projections_compile_and_unfused_ones_are_the_separate_ones_again(make_transformer, inputs):
    model = make_transformer(num_layers=1)
    expected, names = model(**inputs).sample, set(model.state_dict())
    model.fuse_qkv_projections()
    added = set(model.state_dict()) - names
    assert added == {f"transformer_blocks.0.{name}" for name in ("attn1.to_qkv.weight", *CROSS_ATTENTION)}
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(**inputs).sample, expected, **SAME)
    model.unfuse_qkv_projections()
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(**inputs).sample, expected, **SAME)
