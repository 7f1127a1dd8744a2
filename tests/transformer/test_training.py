"""Gradients through the transformer: everywhere, and the same with gradient checkpointing."""

import torch


def gradients_of(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_parameter_learns(make_transformer, inputs):
    gradients = gradients_of(make_transformer(norm_elementwise_affine=True, attention_bias=True), inputs)
    assert {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-6} == set()


def test_gradient_checkpointing_gives_the_same_gradients(make_transformer, inputs):
    model = make_transformer()
    inputs["hidden_states"].requires_grad_()
    expected, expected_input = gradients_of(model, inputs), inputs["hidden_states"].grad.clone()
    calls = []
    model.transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    inputs["hidden_states"].grad = None
    model.enable_gradient_checkpointing()
    found = gradients_of(model, inputs)
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(inputs["hidden_states"].grad, expected_input)
    model.disable_gradient_checkpointing()
    gradients_of(model, inputs)
    assert len(calls) == 3


def test_gradient_checkpointing_keeps_control_residuals(make_transformer, inputs):
    model = make_transformer()
    inputs["controlnet_block_samples"] = (torch.full((2, 24, 32), 0.5, requires_grad=True),)
    expected = gradients_of(model, inputs)
    model.enable_gradient_checkpointing()
    found = gradients_of(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_callers_own_checkpointing_function_is_used(make_transformer, inputs):
    model, seen = make_transformer(), []

    def checkpoint(block, *arguments):
        seen.append(type(block).__name__)
        return block(*arguments)

    model.enable_gradient_checkpointing(checkpoint)
    gradients_of(model, inputs)
    assert seen == ["SanaTransformerBlock"] * 2
