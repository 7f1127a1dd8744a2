"""Other schedulers than ours: diffusers' SCMScheduler, every flow-matching one, and those that cannot serve."""

import logging
from itertools import pairwise

import diffusers
import pytest
import torch
from torch.testing import assert_close

from sana_sprint import SCMScheduler
from sana_sprint.pipelines.clock import CONFIGURABLE_SCHEDULERS, FLOW_SCHEDULERS, clock_for, last_part

CIRCLE = "a red circle"
AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOWS = [
    *[(name, {}) for name in FLOW_SCHEDULERS],
    *[(name, {**AS_FLOW, "flow_shift": 3.0}) for name in CONFIGURABLE_SCHEDULERS],
]


def swapped(pipe, name: str, **settings):
    """The pipeline with another scheduler, made from the present one's config as diffusers' documents do."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


def times_of(pipe, **arguments) -> list[float]:
    """The times that the transformer is called with."""
    times = []

    def note(_module, _arguments, keywords):
        times.append(keywords["timestep"].tolist())

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe(**arguments)
    finally:
        hook.remove()
    return times


def test_diffusers_scm_scheduler_gives_the_same_pictures(pipe, short, seeded):
    for asked in [{}, {"num_inference_steps": 1}, {"num_inference_steps": 4}, {"timesteps": [1.5, 0.7, 0.0]}]:
        pipe.scheduler = SCMScheduler()
        ours = pipe(CIRCLE, **short, **asked, generator=seeded(0)).images
        pipe.scheduler = diffusers.schedulers.scheduling_scm.SCMScheduler()
        theirs = pipe(CIRCLE, **short, **asked, generator=seeded(0)).images
        assert_close(ours, theirs, atol=2e-6, rtol=0)  # the same float32 formulas, in another order


# B10
@pytest.mark.parametrize(("name", "settings"), FLOWS, ids=[name for name, _ in FLOWS])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_flow_scheduler_runs_any_number_of_steps_over_times_from_noise_to_data(
    pipe, short, seeded, name, settings, steps
):
    times = times_of(
        swapped(pipe, name, **settings), prompt=[CIRCLE] * 2, num_inference_steps=steps, **short, generator=seeded(0)
    )
    first, *_, last = [one[0] for one in times] * 2
    assert all(len(one) == 2 and one[0] == one[1] for one in times)
    assert 0.9 < first <= 1
    assert 0 < last <= first
    # Heun's calls the network twice for each step but the last.
    assert len(times) == pipe.num_timesteps == (2 * steps - 1 if "Heun" in name else steps)


@pytest.mark.parametrize(("name", "settings"), FLOWS, ids=[name for name, _ in FLOWS])
def test_a_flow_scheduler_finds_the_data_that_the_velocity_points_to(pipe, name, settings):
    """A network that knows its data, with the velocity (x - data) / time: every solver ends at the data."""
    torch.manual_seed(0)
    data = torch.randn(1, 4, 8, 8)
    clock = clock_for(swapped(pipe, name, **settings).scheduler)
    clock.set_steps(20, None, None, None, torch.device("cpu"))
    latents = clock.from_noise(torch.randn(1, 4, 8, 8))
    for index in range(len(clock.timesteps)):
        latents, estimate = clock.step(
            lambda x, time: (x - data) / time.view(-1, 1, 1, 1), index, latents, torch.Generator().manual_seed(1)
        )
    # The paths are straight, so every order is exact but for float32, in which 20 steps are summed up.
    assert_close(clock.result(estimate), data, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "settings"), FLOWS, ids=[name for name, _ in FLOWS])
@pytest.mark.parametrize("strength", [0.02, 0.33, 0.5, 0.77, 0.99])
def test_a_flow_scheduler_that_starts_later_finds_the_data_too(pipe, name, settings, strength):
    torch.manual_seed(0)
    data = torch.randn(1, 4, 8, 8)
    clock = clock_for(swapped(pipe, name, **settings).scheduler)
    clock.set_steps(20, None, None, None, torch.device("cpu"), strength=strength)
    whole_steps = -(-20 * strength // 1)
    assert len(clock.timesteps) == (2 * whole_steps - 1 if "Heun" in name else whole_steps)
    latents = clock.from_picture(data, torch.randn(1, 4, 8, 8))
    times = []

    def velocity(x, time):
        times.append(float(time))
        return (x - data) / time.view(-1, 1, 1, 1)

    for index in range(len(clock.timesteps)):
        latents, estimate = clock.step(velocity, index, latents, torch.Generator().manual_seed(1))
    assert_close(clock.result(estimate), data, atol=1e-5, rtol=0)  # as above
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("name", "settings"), FLOWS, ids=[name for name, _ in FLOWS])
def test_a_flow_scheduler_of_strength_0_takes_no_step(pipe, name, settings):
    clock = clock_for(swapped(pipe, name, **settings).scheduler)
    clock.set_steps(3, None, None, None, torch.device("cpu"), strength=0.0)
    assert len(clock.timesteps) == 0
    data = torch.randn(1, 4, 8, 8)
    assert_close(clock.result(clock.from_picture(data, torch.randn(1, 4, 8, 8))), data, atol=0, rtol=0)


def test_the_last_part_of_a_table_is_interpolated_at_its_start_only():
    table = torch.tensor([1.5, 1.0, 0.4, 0.0])
    for share, expected in [
        (1.0, [1.5, 1.0, 0.4, 0.0]),
        (5 / 6, [1.25, 1.0, 0.4, 0.0]),
        (2 / 3, [1.0, 0.4, 0.0]),
        (0.5, [0.7, 0.4, 0.0]),
        (1 / 3, [0.4, 0.0]),
        (1 / 6, [0.2, 0.0]),
        (0.0, [0.0]),
    ]:
        assert_close(last_part(table, share), torch.tensor(expected), atol=1e-7, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 49])
def test_shares_that_are_whole_steps_begin_at_the_tables_own_entries_exactly(steps):
    table = torch.linspace(1.5708, 0, steps + 1)
    for k in range(steps + 1):
        assert torch.equal(last_part(table, k / steps), table[steps - k :])


def test_euler_steps_are_those_of_the_flow_written_out(pipe, short, seeded):
    swapped(pipe, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    drawn = pipe(CIRCLE, num_inference_steps=5, **short, generator=seeded(0)).images
    embeds, mask = pipe.encode_prompt(CIRCLE, max_sequence_length=16)
    x = torch.randn(1, 4, 8, 8, generator=seeded(0))  # unit variance: sigma_data belongs to TrigFlow
    for sigma, following in pairwise(pipe.scheduler.sigmas):
        with torch.no_grad():
            velocity = pipe.transformer(
                x,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=sigma.view(1),
                guidance=torch.tensor([0.45]),
                return_dict=False,
            )[0]
        x = x + (following - sigma) * velocity
    assert_close(drawn, x, atol=1e-5, rtol=0)  # float32, five steps


def test_the_same_call_works_again_after_swapping_back(pipe, short, seeded):
    before = pipe(CIRCLE, **short, generator=seeded(0)).images
    scm = pipe.scheduler
    swapped(pipe, "FlowMatchEulerDiscreteScheduler")(CIRCLE, **short, generator=seeded(0))
    pipe.scheduler = scm
    assert_close(pipe(CIRCLE, **short, generator=seeded(0)).images, before, atol=0, rtol=0)


def test_a_teachers_timestep_scale_does_not_change_the_time(pipe, tiny_pipeline_parts, short):
    """Published with 0.001 for a pipeline that counts to 1000; ours counts to 1."""
    config = tiny_pipeline_parts["transformer"].config
    pipe.transformer = type(pipe.transformer).from_config(config, timestep_scale=0.001, guidance_embeds=False)
    times = times_of(swapped(pipe, "FlowMatchEulerDiscreteScheduler"), prompt=CIRCLE, num_inference_steps=2, **short)
    assert times == [[1.0], [pytest.approx(0.001)]]


def test_custom_timesteps_go_to_a_flow_scheduler_that_takes_them(pipe, short):
    swapped(pipe, "FlowMatchEulerDiscreteScheduler")
    times = times_of(pipe, prompt=CIRCLE, timesteps=[1000.0, 600.0, 100.0], **short)
    assert times == [[1.0], [pytest.approx(0.6)], [pytest.approx(0.1)]]


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_custom_timesteps_are_refused_where_the_flow_scheduler_cannot_take_them(pipe, short, name):
    settings = AS_FLOW if "DPM" in name else {}
    with pytest.raises(ValueError, match=f"{name} chooses its timesteps itself"):
        swapped(pipe, name, **settings)(CIRCLE, timesteps=[1000.0, 500.0], **short)


@pytest.mark.parametrize("asked", [{"max_timesteps": 1.5}, {"intermediate_timesteps": 1.0}])
def test_angles_are_refused_with_a_flow_scheduler(pipe, short, asked):
    with pytest.raises(ValueError, match="is an angle of SCMScheduler"):
        swapped(pipe, "FlowMatchEulerDiscreteScheduler")(CIRCLE, **short, **asked)


# B10, and the poor message of upstream
@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("DDIMScheduler", {"prediction_type": "epsilon"}, "got DDIMScheduler"),
        ("LCMScheduler", {"prediction_type": "epsilon"}, "got LCMScheduler"),
        ("EulerDiscreteScheduler", {"prediction_type": "epsilon"}, "got EulerDiscreteScheduler"),
        ("TCDScheduler", {"prediction_type": "epsilon"}, "got TCDScheduler"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon"}, "use_flow_sigmas=False"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "prediction_type='epsilon'"),
    ],
)
def test_a_scheduler_that_cannot_serve_is_refused_with_those_that_can(pipe, short, name, settings, found):
    called = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda *_: called.append(True))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler") as refusal:
        swapped(pipe, name, **settings)(CIRCLE, **short)
    hook.remove()
    assert "SCMScheduler" in str(refusal.value)
    assert found in str(refusal.value)
    assert not called


def test_settings_left_over_in_a_config_do_not_make_a_flow_scheduler(pipe):
    """diffusers keeps another scheduler's settings in the config, where they have no effect."""
    flow = diffusers.DPMSolverMultistepScheduler(**AS_FLOW)
    epsilon = diffusers.DDIMScheduler.from_config(flow.config, prediction_type="epsilon")
    assert epsilon.config.use_flow_sigmas
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        clock_for(epsilon)


def test_swapping_schedulers_logs_nothing(pipe, short, caplog):
    with caplog.at_level(logging.WARNING):
        swapped(pipe, "FlowMatchEulerDiscreteScheduler")(CIRCLE, num_inference_steps=4, **short)
    assert not caplog.records
