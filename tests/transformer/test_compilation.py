"""torch.compile: no graph breaks, whatever the size; and the repeated blocks alone."""

from typing import Any

import pytest
import torch

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
