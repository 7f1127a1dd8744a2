"""Memory that is counted without being taken, against published sizes and against a real step."""

from dataclasses import replace

import pytest
import torch
from tiny_training import CONFIG, TinyFlow

from sana_sprint.memory.configs import PUBLISHED
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import use_training_kernels
from sana_sprint.training.footprint import EmptyLatents, footprint
from sana_sprint.training.optimiser import Optimiser, OptimiserSettings, ParameterGroup
from sana_sprint.training.recipes import find_recipe
from sana_sprint.training.recipes.overrides import override
from sana_sprint.training.recipes.shapes import ShapesRecipe
from sana_sprint.training.rehearsal import rehearse
from sana_sprint.training.settings import LoopSettings
from sana_sprint.training.stages import STAGES


def published_config(recipe):
    return {**PUBLISHED[recipe.published], "guidance_embeds": False}


@pytest.mark.parametrize(
    ("size", "teacher", "student"),
    [("0.6b", 591_876_896, 593_501_216), ("1.6b", 1_604_641_952, 1_610_237_472)],
)
def test_a_sprint_recipe_needs_what_its_networks_take(size, teacher, student):
    recipe = find_recipe(f"sprint_{size}_1024")
    found = rehearse(recipe, published_config(recipe))["distillation"]
    networks = found.networks
    assert (networks["teacher"].parameters, networks["student"].parameters) == (teacher, student)
    assert networks["teacher"].total == 2 * teacher  # bfloat16, and nothing that is trained
    assert networks["student"].weights == networks["student"].gradients == networks["student"].average == 4 * student
    assert networks["student"].moments == 8 * student
    assert networks["discriminator"].average == 0
    assert found.examples == 16
    assert found.total == found.activations + sum(network.total for network in networks.values())


def test_running_blocks_again_takes_a_fraction_of_the_memory():
    recipe = find_recipe("sprint_0.6b_1024")
    recipe = override(recipe, ["loop.batch_size=2", "loop.accumulation=1", "distillation.head_blocks=0,2"])
    config = {**published_config(recipe), "num_layers": 4}
    again, kept = (
        rehearse(replace(recipe, gradient_checkpointing=setting), config)["distillation"].activations
        for setting in (True, False)
    )
    assert again < kept / 5  # of four blocks; what the heads keep is the same


def test_a_lora_needs_its_model_once_and_gradients_of_its_adapters_alone():
    recipe = find_recipe("lora")
    config = {**PUBLISHED[recipe.published], "num_layers": 2}
    networks = rehearse(recipe, config)["adapters"].networks
    adapters, frozen = networks["adapters"], networks["transformer"]
    assert frozen.total == frozen.weights == 2 * frozen.parameters  # bfloat16, and nothing that is trained
    assert adapters.weights == adapters.gradients == adapters.average == 4 * adapters.parameters
    assert adapters.moments == 8 * adapters.parameters
    width, hidden = 1152, 2 * int(2.5 * 1152)
    sides = 8 * (width + width) + (width + hidden) + (hidden // 2 + width)
    assert adapters.parameters == 2 * recipe.lora.rank * sides


def test_a_teacher_recipe_needs_what_its_network_takes():
    recipe = find_recipe("teacher_1.6b_1024")
    (network,) = rehearse(recipe, published_config(recipe))["flow"].networks.values()
    assert network.parameters == 1_604_641_952
    assert network.total == 20 * network.parameters


def test_every_stage_of_the_shapes_recipe_is_counted():
    found = rehearse(ShapesRecipe(), {})
    assert list(found) == list(STAGES[:-1])
    assert found["decoder"].networks["vae"].gradients < found["autoencoder"].networks["vae"].gradients
    assert found["guidance"].networks["teacher"].gradients == 0
    encoder, matching, expansion = (found[stage].networks for stage in ("encoder", "matching", "expansion"))
    assert 0 < encoder["vae"].gradients < found["autoencoder"].networks["vae"].gradients / 10
    assert encoder["original"].gradients == 0
    assert expansion["student"].parameters > matching["student"].parameters == expansion["fake_score"].parameters
    # Muon keeps one number for each weight of the blocks' matrices, AdamW two for the others.
    student = found["distillation"].networks["student"]
    assert student.gradients < student.moments < 1.5 * student.gradients
    assert all(each.activations > each.examples for each in found.values())


def kept_by_autograd(objective, draws):
    """Bytes of what a real step keeps, weights apart."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (*objective.parameters(), *objective.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = objective(draws)
    assert losses["loss"].isfinite()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_a_real_step(precision):
    real = TinyFlow()
    use_training_kernels(real.transformer)
    loop = LoopSettings(steps=1, batch_size=8, accumulation=2, precision=precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        wanted = kept_by_autograd(real, Draws.of_step(loop.seed, 0, 4))
    with torch.device("meta"):
        empty = TinyFlow().to("meta")
        use_training_kernels(empty.transformer)
        empty.data = EmptyLatents((4, 4, 4), (5, CONFIG["caption_channels"]))
        found = footprint(empty, loop)
    assert found.examples == 4
    assert found.activations == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_moments_are_those_that_the_optimiser_keeps(kind):
    settings = OptimiserSettings(learning_rate=1e-3, kind=kind)
    layer = torch.nn.Linear(128, 64)

    class OneLayer(TinyFlow):
        """A tiny flow of which one layer is trained."""

        def groups(self):
            return [ParameterGroup("layer", list(self.layer.parameters()), settings)]

    objective = OneLayer().to("meta")
    objective.layer = torch.nn.Linear(128, 64, device="meta")
    objective.data = EmptyLatents((4, 4, 4), (5, CONFIG["caption_channels"]))
    found = footprint(objective, LoopSettings(steps=1, batch_size=2, precision="fp32")).networks["layer"].moments
    optimiser = Optimiser(ParameterGroup("layer", list(layer.parameters()), settings))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.update(0, 1)
    shared = ("qmap1", "qmap2")  # bitsandbytes: one table for all parameters
    kept = [
        value
        for state in optimiser.adamw.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and name not in shared
    ]
    assert found == sum(tensor.numel() * tensor.element_size() for tensor in kept)
