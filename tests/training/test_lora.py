"""Adapters in training: they alone learn, by consistency along the pictures' own way, and keep what a prior shows."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny_training import OPTIMISER, tiny_data, tiny_teacher

from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowData, predict_velocity, use_training_kernels
from sana_sprint.training.loop import train
from sana_sprint.training.lora import TARGETS, LoraObjective, LoraSettings, add_adapters, huber_loss, without_adapters
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.trigflow.bridge import trigflow_velocity
from sana_sprint.trigflow.consistency import consistency_tangent
from sana_sprint.trigflow.path import add_noise, predict_clean, velocity_target

CPU = torch.device("cpu")
SETTINGS = LoraSettings(
    optimiser=replace(OPTIMISER, learning_rate=2e-2), rank=4, targets=(*TARGETS, "proj_out"), guidance_scales=(4.5,)
)
LOOP = LoopSettings(steps=80, batch_size=8, precision="fp32", ema_decay=0.9, seed=1)
# Two pictures without any pattern, which a tiny network can learn.
PICTURES = replace(
    tiny_data(2),
    latents=torch.tensor([[1.0, -1, 1, -1], [-1, -1, 1, 1]]).view(2, 4, 1, 1).expand(2, 4, 4, 4).contiguous(),
)


def objective(prior: FlowData | None = None, settings: LoraSettings = SETTINGS, blocks_again: bool = False):
    """A tiny Sprint model, random, with adapters for pictures that it has not seen."""
    transformer = tiny_teacher()
    if blocks_again:
        transformer.enable_gradient_checkpointing()
    torch.manual_seed(1)
    return LoraObjective(transformer, PICTURES, settings, prior)


def one_step(transformer: SanaTransformer2DModel, source: FlowData) -> torch.Tensor:
    """What is drawn in one step, from the same noise, with each of the captions."""
    size = len(source.latents)
    noise = torch.randn(size, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    angle = torch.full((size,), torch.pi / 2)
    caption, mask = source.captions[:size].float(), source.masks[:size]

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return predict_velocity(transformer, latents, time, caption, mask, torch.full((size,), 4.5))

    with torch.no_grad():
        return predict_clean(noise, trigflow_velocity(network, noise, angle, sigma_data=1.0), angle)


def trained(folder, **given) -> LoraObjective:
    """An objective after training, with the average of its adapters put on."""
    made = objective(**given)
    average = train(made, LOOP, folder, "adapters", CPU)
    with torch.no_grad():
        for parameter, weight in zip(made.adapters, average, strict=True):
            parameter.copy_(weight)
    made.eval()
    return made


@pytest.fixture(scope="module")
def without_prior(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("free"))


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    made = objective()
    plain = tiny_teacher()
    use_training_kernels(plain)
    assert torch.equal(one_step(made.transformer, made.data), one_step(plain, made.data))
    learning = {name for name, parameter in made.transformer.named_parameters() if parameter.requires_grad}
    assert {name.replace(".default.", ".") for name in learning} == set(made.names)
    assert all("lora_" in name for name in learning)
    (group,) = made.groups()
    assert list(map(id, group.parameters)) == list(map(id, made.averaged()))
    made(Draws.of_step(0, 0, 4))["loss"].backward()
    ups = [parameter for name, parameter in zip(made.names, made.adapters, strict=True) if "lora_B" in name]
    assert len(ups) == 2 * (8 + 2) + 1  # two blocks of two attentions and a mix-FFN, and the way out
    assert all(parameter.grad.any() for parameter in ups)


def test_training_leaves_the_model_as_it_was_beneath_its_adapters(without_prior):
    plain = tiny_teacher().state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in without_prior.transformer.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in plain.items())
    ups = [parameter for name, parameter in zip(without_prior.names, without_prior.adapters) if "lora_B" in name]
    assert all(parameter.any() for parameter in ups)


def test_one_step_comes_nearer_to_the_pictures(without_prior):
    """By a loss that has no value to compare them with: what is known at small angles spreads to the larger ones."""
    goal = without_prior.data.latents
    before = (one_step(tiny_teacher(), without_prior.data) - goal).norm()
    assert (one_step(without_prior.transformer, without_prior.data) - goal).norm() < 0.75 * before


def test_the_tangent_is_that_of_consistency_along_the_pictures_own_way():
    """With the derivative as a difference of two predictions, on the way from the picture to its noise."""
    made, draws = objective(), Draws.of_step(0, 5, 4)
    batch = made.data.batch(draws)
    clean, caption, mask = batch.clean, batch.caption, batch.mask
    noise, guidance = draws.normal(clean.shape[1:]), draws.choice((4.5,))
    angle = SETTINGS.angles.draw(draws, SETTINGS.sigma_data)

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return predict_velocity(made.transformer, latents, time, caption, mask, guidance)

    def velocity(angle: torch.Tensor) -> torch.Tensor:
        return trigflow_velocity(network, add_noise(clean, noise, angle), angle, sigma_data=1.0).detach()

    step, own = 5e-3, velocity_target(clean, noise, angle)
    c, s = (function(angle).view(-1, 1, 1, 1) for function in (torch.cos, torch.sin))
    derivative = c * s * (velocity(angle + step) - velocity(angle - step)) / (2 * step)
    losses = made(Draws.of_step(0, 5, 4))
    torch.testing.assert_close(losses["derivative_norm"], derivative.flatten(1).norm(dim=1).mean(), rtol=0.02, atol=0)
    # Of the whole tangent, from the first step on.
    whole = consistency_tangent(add_noise(clean, noise, angle), angle, velocity(angle), own, derivative, warmup=1.0)
    length = whole.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(losses["consistency"], length, rtol=1e-3, atol=0)


def test_a_prior_holds_what_would_change_without_one(without_prior, tmp_path):
    prior = tiny_data(16)
    with_prior = trained(tmp_path, prior=prior)
    before = one_step(tiny_teacher(), prior)
    changes = [(one_step(made.transformer, prior) - before).norm() for made in (without_prior, with_prior)]
    assert changes[1] < 0.7 * changes[0]


def test_a_network_that_has_not_moved_has_kept_everything():
    losses = objective(prior=tiny_data(16))(Draws.of_step(0, 0, 4))
    assert losses["preservation"] == 0
    assert losses["loss"] == losses["consistency"]


def test_the_weight_of_the_prior_counts():
    made = objective(prior=tiny_data(16), settings=replace(SETTINGS, preservation_weight=3.0))
    for parameter in made.adapters:
        torch.nn.init.constant_(parameter, 0.1)
    losses = made(Draws.of_step(0, 0, 4))
    assert losses["preservation"] > 0.1
    torch.testing.assert_close(losses["loss"], losses["consistency"] + 3 * losses["preservation"])


def test_without_adapters_is_the_model_as_it_was_and_they_go_on_learning_after_it(without_prior):
    made = deepcopy(without_prior)
    plain = tiny_teacher()
    use_training_kernels(plain)
    with without_adapters(made.transformer):
        assert torch.equal(one_step(made.transformer, made.data), one_step(plain, made.data))
    assert not torch.equal(one_step(made.transformer, made.data), one_step(plain, made.data))
    assert all(parameter.requires_grad for parameter in made.adapters)
    assert not made.transformer.proj_out.weight.requires_grad


def test_other_adapters_are_worn_for_a_while(without_prior):
    made = deepcopy(without_prior).train()
    own = one_step(made.transformer, made.data)
    nothing = torch.nn.ParameterList(torch.zeros_like(parameter) for parameter in made.adapters)
    with made.wearing(nothing) as transformer:
        assert not transformer.training
        torch.testing.assert_close(one_step(transformer, made.data), one_step(tiny_teacher(), made.data))
    assert made.transformer.training
    assert torch.equal(one_step(made.transformer, made.data), own)


def test_blocks_that_are_run_again_change_no_loss_and_no_gradient():
    made = [objective(prior=tiny_data(16), blocks_again=again).train() for again in (False, True)]
    for each in made:
        for parameter in each.adapters:
            torch.nn.init.constant_(parameter, 0.1)
    losses = [each(Draws.of_step(0, 3, 4)) for each in made]
    for each in losses:
        each["loss"].backward()
    torch.testing.assert_close(losses[1], losses[0])
    wanted, found = ([parameter.grad for parameter in each.adapters] for each in made)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # float32, in another order of sums


def test_a_model_in_bfloat16_has_adapters_in_float32_that_learn_under_autocast():
    transformer = tiny_teacher().bfloat16()
    made = LoraObjective(transformer, tiny_data(), SETTINGS, tiny_data(16)).train()
    assert {parameter.dtype for parameter in made.adapters} == {torch.float32}
    assert transformer.proj_out.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        losses = made(Draws.of_step(0, 0, 4))
    losses["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.adapters)


def test_two_parts_of_a_batch_have_the_losses_of_the_whole():
    made = objective(prior=tiny_data(16))
    whole = made(Draws.of_step(0, 3, 8))["loss"]
    parts = [made(Draws.of_step(0, 3, 4, part, 2))["loss"] for part in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_the_huber_loss_is_a_length_far_out_and_a_square_near_zero():
    direction = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    direction = direction / direction.norm()
    offset = 0.03 * 20  # of 400 numbers
    near, far = huber_loss(1e-2 * direction), huber_loss(1e4 * direction)
    torch.testing.assert_close(near, torch.tensor([1e-4 / (2 * offset)]), rtol=1e-3, atol=0)
    torch.testing.assert_close(far, torch.tensor([1e4 - offset]), rtol=1e-6, atol=0)


def test_targets_are_ends_of_names():
    adapters = add_adapters(tiny_teacher(), 2, ("attn2.to_k", "proj_out"))
    layers = {name.partition(".lora_")[0] for name in adapters}
    assert layers == {"transformer_blocks.0.attn2.to_k", "transformer_blocks.1.attn2.to_k", "proj_out"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("to_q", "to_x"), "has no layers to_x"), (("norm_q",), "not supported")],
)
def test_targets_that_are_no_layers_to_adapt_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny_teacher(), 2, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"targets": ()}, "targets must name layers"),
        ({"guidance_scales": ()}, "at least one scale"),
        ({"preservation_weight": -1.0}, "preservation_weight must be 0 or more"),
        ({"preservation_weight": float("nan")}, "preservation_weight must be 0 or more"),
        ({"pure_noise_share": 1.5}, r"pure_noise_share must lie in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)
