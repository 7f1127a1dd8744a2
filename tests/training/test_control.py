"""A ControlNet's first stage with tiny real networks: what it changes, who learns, and that a run goes on."""

from dataclasses import replace

import pytest
import torch
from tiny_control import controlled_data, open_control
from tiny_training import CONFIG, LOOP, OPTIMISER, tiny_data, tiny_teacher

from sana_sprint.training.control import ControlObjective, controlled_velocity, train_control
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowMatchingSettings, FlowObjective, predict_velocity
from sana_sprint.transformer.control import SanaControlNetModel

SETTINGS = FlowMatchingSettings(optimiser=OPTIMISER, compile=False)
CPU = torch.device("cpu")


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize("placement", ["after", "before"])
def test_an_untrained_control_net_changes_neither_loss_nor_velocity(guidance_embeds, placement):
    transformer = tiny_teacher(guidance_embeds=guidance_embeds)
    control = SanaControlNetModel.from_transformer(transformer, 1, placement)
    data, draws = controlled_data(), Draws.of_step(0, 0, 4)
    with torch.no_grad():
        controlled = ControlObjective(transformer, control, data, SETTINGS)(draws)
        plain = FlowObjective(transformer, tiny_data(), SETTINGS)(Draws.of_step(0, 0, 4))
    assert controlled == plain
    batch, guidance = data.batch(Draws.of_step(0, 1, 3)), torch.tensor([1.0, 4.5, 9.0])
    inputs = batch.clean, torch.tensor([0.1, 0.5, 0.9])
    own = guidance if guidance_embeds else None
    velocity = controlled_velocity(transformer, control, *inputs, batch, guidance)
    assert torch.equal(velocity, predict_velocity(transformer, *inputs, batch.caption, batch.mask, own))


def test_the_drawing_counts_once_the_exits_are_open():
    transformer = tiny_teacher()
    objective = ControlObjective(transformer, open_control(transformer), controlled_data(), SETTINGS)
    before = objective(Draws.of_step(0, 0, 4))["loss"]
    objective.data = replace(objective.data, controls=objective.data.controls + 1)
    assert objective(Draws.of_step(0, 0, 4))["loss"] != before


def test_only_the_control_net_learns_and_its_guidance_embedding_waits():
    transformer = tiny_teacher()
    objective = ControlObjective(transformer, open_control(transformer), controlled_data(), SETTINGS).train()
    objective(Draws.of_step(0, 0, 4))["loss"].backward()
    learning = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    wanted = {name for name, _ in objective.named_parameters() if name.startswith("control.")}
    assert learning == {name for name in wanted if "guidance_embedder" not in name}
    assert learning < wanted
    (group,) = objective.groups()
    assert group.name == "control"
    assert {id(parameter) for parameter in group.parameters} == {
        id(parameter) for name, parameter in objective.named_parameters() if name in learning
    }
    assert not transformer.training
    assert objective.control.training


def test_training_moves_the_control_net_alone_and_lowers_its_loss(tmp_path):
    transformer = tiny_teacher()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    untrained = SanaControlNetModel.from_transformer(transformer, 1)
    loop = replace(LOOP, steps=60, batch_size=16, ema_decay=0.5)
    data = controlled_data(4)

    @torch.no_grad()
    def loss(control):
        objective = ControlObjective(transformer, control, data, SETTINGS)
        return torch.stack([objective(Draws.of_step(9, step, 16))["loss"] for step in range(4)]).mean()

    first = loss(untrained)
    trained = train_control(transformer, untrained, data, SETTINGS, loop, tmp_path, CPU)
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
    assert loss(trained) < 0.9 * first


def test_a_run_that_stopped_ends_with_the_weights_of_one_that_did_not(tmp_path):
    def run(folder):
        transformer = tiny_teacher()
        control = SanaControlNetModel.from_transformer(transformer, 1)
        return train_control(transformer, control, controlled_data(), SETTINGS, LOOP, folder, CPU).state_dict()

    whole = run(tmp_path)
    (tmp_path / f"state-{LOOP.steps:06d}.pt").unlink()  # as if it had been killed before the last checkpoint
    gone_on = run(tmp_path)
    assert all(torch.equal(value, gone_on[name]) for name, value in whole.items())


def test_a_batch_brings_each_pictures_own_drawing():
    data = controlled_data()
    for misaligned in (False, True):
        batch = data.batch(Draws.of_step(0, 0, 8), misaligned=misaligned)
        places = [torch.eq(data.latents, clean).flatten(1).all(1).nonzero().item() for clean in batch.clean]
        assert torch.equal(batch.control, data.controls[places])
    assert tiny_data().batch(Draws.of_step(0, 0, 8)).control is None


def test_what_is_trained_loads_alone(tmp_path):
    control = open_control(tiny_teacher())
    control.save_pretrained(tmp_path)
    loaded = SanaControlNetModel.from_pretrained(tmp_path)
    assert loaded.config.guidance_embeds == CONFIG["guidance_embeds"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())
