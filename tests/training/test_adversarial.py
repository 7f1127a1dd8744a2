"""The discriminator: its losses by hand, its statistics, and the teacher's features it looks at."""

import pytest
import torch
from tiny_training import CONFIG
from torch import nn

from sana_sprint.training.adversarial import (
    Discriminator,
    LocalBatchNorm,
    block_features,
    discriminator_loss,
    frozen,
    generator_loss,
    gradient_penalty,
)
from sana_sprint.transformer.model import SanaTransformer2DModel


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def discriminator(width: int = 8) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(2, width)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * (0.25 + (0 + 1 + 2 + 0.5) / 4)))
    torch.testing.assert_close(generator_loss(fake), torch.tensor(2.5 / 4))


def test_one_logit_per_head_and_token():
    assert discriminator()([draw(3, 8, 4, 5), draw(3, 8, 4, 5)]).shape == (3, 2 * 20)


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (7, 7), (8, 8), (12, 6), (16, 8)])
def test_statistics_are_shared_by_at_most_eight_examples_whatever_the_batch(batch, group):
    x = 3 + 2 * draw(batch, 4, 5, 5)
    y = LocalBatchNorm(4)(x).unflatten(0, (-1, group)).transpose(1, 2).flatten(2)  # G D values
    torch.testing.assert_close(y.mean(2), torch.zeros(batch // group, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(2, correction=0), torch.ones(batch // group, 4), atol=1e-4, rtol=0)


def test_parts_of_eight_have_the_logits_that_the_whole_batch_has():
    module, features = discriminator().eval(), [draw(16, 8, 4, 4), draw(16, 8, 4, 4, seed=1)]
    parts = [module([x[start : start + 8] for x in features]) for start in (0, 8)]
    torch.testing.assert_close(torch.cat(parts), module(features))


def test_features_are_those_that_the_next_layers_of_the_transformer_see():
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(**CONFIG).eval()
    latents, time, caption, mask, guidance = (
        draw(2, 4, 4, 6),
        torch.tensor([0.2, 0.9]),
        draw(2, 5, 8),
        None,
        torch.ones(2),
    )
    first, last = block_features(transformer, (0, 1), latents, time, caption, mask, guidance)
    assert first.shape == last.shape == (2, 8, 4, 6)
    _, time_embedding = transformer.time_embed(time, guidance, latents.dtype)
    tokens = transformer.norm_out(last.flatten(2).transpose(1, 2), time_embedding, transformer.scale_shift_table)
    sample = transformer.proj_out(tokens).transpose(1, 2).unflatten(2, (4, 6))
    expected = transformer(latents, caption, time, guidance, return_dict=False)[0]
    torch.testing.assert_close(sample, expected)
    assert not torch.equal(first, last)


def test_a_frozen_module_passes_gradients_through_and_keeps_none():
    module, features = discriminator(), [draw(2, 8, 3, 3).requires_grad_() for _ in range(2)]
    with frozen(module):
        logits = module(features)
    logits.sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert all(x.grad is not None and x.grad.any() for x in features)
    with pytest.raises(RuntimeError, match="inside"), frozen(module):
        raise RuntimeError("inside")
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_gradient_penalty_of_a_linear_function_is_its_squared_slope():
    weight, x = draw(6), draw(4, 6).requires_grad_()
    logits = (x @ weight)[:, None].expand(-1, 3)
    torch.testing.assert_close(gradient_penalty(logits, [x]), weight.square().sum())


def test_the_gradient_penalty_trains_the_heads():
    module, features = discriminator(), [draw(4, 8, 3, 3, seed=seed).requires_grad_() for seed in range(2)]
    gradient_penalty(module(features), features).backward()
    assert all(layer.weight.grad is not None for layer in module.modules() if isinstance(layer, LocalBatchNorm))


def test_it_learns_to_tell_real_from_fake():
    module = discriminator()
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    # Two kinds of the same mean and variance: only how neighbours hang together differs.
    smooth = nn.functional.avg_pool2d(draw(8, 8, 8, 8, seed=1), 3, 1, 1) * 3

    def losses() -> torch.Tensor:
        return discriminator_loss(module([smooth, smooth]), module([draw(8, 8, 8, 8, seed=2)] * 2))

    for _ in range(50):
        optimiser.zero_grad()
        losses().backward()
        optimiser.step()
    # The last layer is of norm one, and eight channels leave little room between the two.
    assert losses().item() < 0.95
