"""SCMScheduler: beside the installed diffusers' own, and where it goes beyond that one."""

import copy
import inspect
import math

import diffusers
import numpy as np
import pytest
import torch

from sana_sprint.trigflow.scheduler import (
    INTERMEDIATE_TIMESTEPS,
    MAX_TIMESTEPS,
    SCMScheduler,
    SCMSchedulerOutput,
    timetable,
)

ARCTAN_400 = 1.5682963  # the paper's arctan(200 / 0.5)

# What the installed diffusers needs to be told, for timetables that both libraries can make.
COMMON_TIMETABLES = {
    "2 steps, defaults": {"num_inference_steps": 2},
    "2 steps, other angles": {"num_inference_steps": 2, "max_timesteps": 1.5683, "intermediate_timesteps": 1.0},
    "1 step": {"num_inference_steps": 1, "intermediate_timesteps": None},
    "2 steps, even": {"num_inference_steps": 2, "intermediate_timesteps": None},
    "3 steps, even": {"num_inference_steps": 3, "intermediate_timesteps": None},
    "4 steps, even": {"num_inference_steps": 4, "intermediate_timesteps": None},
    "20 steps, even": {"num_inference_steps": 20, "intermediate_timesteps": None, "max_timesteps": 1.55413},
    "custom": {
        "num_inference_steps": 4,
        "timesteps": [1.5683, 1.3, 1.1, 0.6, 0.0],
        "max_timesteps": None,
        "intermediate_timesteps": None,
    },
    "custom, not to the end": {
        "num_inference_steps": 2,
        "timesteps": torch.tensor([1.2, 0.8, 0.1]),
        "max_timesteps": None,
        "intermediate_timesteps": None,
    },
}


def velocity(sample: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * sample.roll(1, -1)) - sample


def run(scheduler, generator, timetable_arguments: dict, sigma_data: float = 0.5) -> list[torch.Tensor]:
    """Every tensor that a run of the scheduler returns, from noise of the generator."""
    scheduler.set_timesteps(**timetable_arguments)
    scheduler.set_begin_index(0)
    first = generator[0] if isinstance(generator, list) else generator
    sample = sigma_data * torch.randn(2, 3, 4, 5, generator=first)
    returned = []
    for t in scheduler.timesteps[:-1]:
        sample, clean = scheduler.step(velocity(sample), t.expand(2), sample, generator=generator, return_dict=False)
        returned += [sample, clean]
    return returned


@pytest.mark.parametrize("arguments", COMMON_TIMETABLES.values(), ids=COMMON_TIMETABLES)
def test_every_step_is_that_of_diffusers_bit_for_bit(arguments):
    ours, theirs = SCMScheduler(), diffusers.SCMScheduler()
    ours_generator, their_generator = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    # The second picture of the same generators shows that both have drawn equally much for the first.
    for _ in range(2):
        our_run, their_run = run(ours, ours_generator, arguments), run(theirs, their_generator, arguments)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert len(our_run) == 2 * ours.num_inference_steps == 2 * theirs.num_inference_steps
        assert all(torch.equal(a, b) for a, b in zip(our_run, their_run, strict=True))


def test_a_generator_for_each_sample_draws_as_in_diffusers():
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2)]
    arguments = COMMON_TIMETABLES["2 steps, defaults"]
    ours = run(SCMScheduler(), generators[0], arguments)
    theirs = run(diffusers.SCMScheduler(), generators[1], arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_signatures_are_those_of_diffusers():
    for name in ("__init__", "set_timesteps", "step", "index_for_timestep", "set_begin_index"):
        ours = inspect.signature(getattr(SCMScheduler, name)).parameters
        theirs = inspect.signature(getattr(diffusers.SCMScheduler, name)).parameters
        assert list(ours) == list(theirs)
        defaults = {key: parameter.default for key, parameter in theirs.items()}
        if name == "set_timesteps":
            defaults["num_inference_steps"] = None  # the one that custom angles make superfluous
        assert {key: parameter.default for key, parameter in ours.items()} == defaults


def test_attributes_are_those_of_diffusers_before_and_after_set_timesteps():
    ours, theirs = SCMScheduler(num_train_timesteps=50), diffusers.SCMScheduler(num_train_timesteps=50)
    for _ in range(2):
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.timesteps.dtype == theirs.timesteps.dtype
        for name in ("order", "init_noise_sigma", "num_inference_steps", "step_index", "begin_index", "__len__"):
            our_value, their_value = getattr(ours, name), getattr(theirs, name)
            assert (our_value() == their_value()) if callable(our_value) else (our_value == their_value)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(2)
            scheduler.set_begin_index(1)


# --- what angles are chosen


@pytest.mark.parametrize(
    ("steps", "angles"),
    [
        (1, [1.57080, 0]),
        (2, [1.57080, 1.3, 0]),
        (3, [ARCTAN_400, 1.3, 0.6, 0]),
        (4, [ARCTAN_400, 1.3, 1.1, 0.6, 0]),
        (5, [1.57080, 1.25664, 0.94248, 0.62832, 0.31416, 0]),
    ],
)
def test_every_number_of_steps_has_a_timetable_by_default(steps, angles):
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps == steps
    assert scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(angles), atol=2e-7, rtol=0)  # float32 rounding


def test_a_first_angle_that_was_asked_for_replaces_the_first_of_the_list():
    assert timetable(4, 1.5, INTERMEDIATE_TIMESTEPS).tolist() == pytest.approx([1.5, 1.3, 1.1, 0.6, 0])
    assert timetable(2, 1.5, INTERMEDIATE_TIMESTEPS).tolist() == pytest.approx([1.5, 1.3, 0])
    assert timetable(4, 1.57080, INTERMEDIATE_TIMESTEPS)[0] == pytest.approx(1.57080)


def test_published_defaults_are_told_from_the_same_numbers_through_copies():
    for default in (MAX_TIMESTEPS, copy.deepcopy(MAX_TIMESTEPS), copy.copy(MAX_TIMESTEPS)):
        assert default == 1.57080
        assert timetable(4, default, INTERMEDIATE_TIMESTEPS)[0] == pytest.approx(ARCTAN_400)
    assert INTERMEDIATE_TIMESTEPS == 1.3
    with pytest.raises(ValueError, match="leave it out"):
        timetable(4, MAX_TIMESTEPS, 1.3)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.float16)])
def test_custom_angles_in_any_form_need_nothing_else(form):
    angles = [1.5, 1.25, 0.5, 0.0]  # all of them float16 numbers
    scheduler = SCMScheduler()
    scheduler.set_timesteps(timesteps=form(angles))
    assert scheduler.num_inference_steps == 3
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps.tolist() == angles
    scheduler.set_timesteps(3, form(angles), intermediate_timesteps=None, max_timesteps=None)
    assert scheduler.timesteps.tolist() == angles


def with_own_timetable(angles):
    return SCMScheduler.from_config({**SCMScheduler().config, "_timesteps": {"2": angles}})


def test_a_configs_own_timetable_is_the_default_for_its_number_of_steps():
    scheduler = with_own_timetable([1.5, 1.0, 0.0])
    for options, angles in [
        ({"num_inference_steps": 2}, [1.5, 1.0, 0.0]),
        ({"num_inference_steps": 1}, [1.5708, 0.0]),
        ({"num_inference_steps": 2, "intermediate_timesteps": 1.3}, [1.5708, 1.3, 0.0]),
        ({"num_inference_steps": 2, "intermediate_timesteps": None}, [1.5708, 0.7854, 0.0]),
        ({"timesteps": [1.2, 0.3, 0.0]}, [1.2, 0.3, 0.0]),
    ]:
        scheduler.set_timesteps(**options)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor(angles))


def test_a_configs_own_timetable_survives_saving_by_either_library(tmp_path):
    with_own_timetable([1.5, 1.0, 0.0]).save_pretrained(tmp_path / "ours")
    diffusers.SCMScheduler.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    scheduler = SCMScheduler.from_pretrained(tmp_path / "theirs")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1.5, 1.0, 0.0]


@pytest.mark.parametrize("angles", [[1.5, 0.0], [1.0, 1.5, 0.0]])
def test_a_configs_own_timetable_that_is_none_is_refused(angles):
    with pytest.raises(ValueError, match=r"_timesteps in the scheduler's config|must descend"):
        with_own_timetable(angles).set_timesteps(2)


def test_custom_angles_are_copied():
    angles = torch.tensor([1.5, 0.5, 0.0])
    scheduler = SCMScheduler()
    scheduler.set_timesteps(timesteps=angles)
    angles.zero_()
    assert scheduler.timesteps.tolist() == [1.5, 0.5, 0.0]


def test_timesteps_go_to_the_device_asked_for_and_steps_do_not_read_them_back():
    """On the meta device no value can be read, so a step that works has read none from there."""
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2, device="meta")
    scheduler.set_begin_index(0)
    assert scheduler.timesteps.device.type == "meta"
    sample = torch.zeros(1, 3, 2, 2, device="meta")
    for t in scheduler.timesteps[:-1]:
        sample = scheduler.step(sample, t, sample).prev_sample
    assert sample.device.type == "meta"
    assert scheduler.step_index == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu_never_waits_for_it():
    scheduler, generator = SCMScheduler(), torch.Generator("cuda").manual_seed(0)
    scheduler.set_timesteps(4, device="cuda")
    scheduler.set_begin_index(0)
    sample = torch.randn(1, 32, 32, 32, device="cuda", generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps[:-1]:
            sample = scheduler.step(velocity(sample), t, sample, generator).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sample.isfinite().all()


# --- stepping


def test_a_true_velocity_gives_the_clean_latents_back_and_the_last_step_adds_no_noise():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    clean, noise = 0.5 * torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    t = scheduler.timesteps[0].double()
    output = scheduler.step(t.cos() * noise - t.sin() * clean, t, t.cos() * clean + t.sin() * noise)
    assert isinstance(output, SCMSchedulerOutput)
    # The scheduler turns by float32 cosines, right to 6e-8, of numbers up to 1.
    torch.testing.assert_close(output.pred_original_sample, clean, atol=1e-6, rtol=0)
    assert torch.equal(output.prev_sample, output.pred_original_sample)


def test_without_a_begin_index_the_first_timestep_is_looked_up():
    arguments = COMMON_TIMETABLES["4 steps, even"]
    sample = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    outputs = []
    for scheduler in (SCMScheduler(), diffusers.SCMScheduler()):
        scheduler.set_timesteps(**arguments)
        generator = torch.Generator().manual_seed(1)
        outputs.append(scheduler.step(-sample, scheduler.timesteps[2], sample, generator).prev_sample)
        assert scheduler.step_index == 3
    assert torch.equal(*outputs)


@pytest.mark.parametrize("timestep", [1.3, torch.tensor(1.3), torch.tensor([1.3, 1.3]), torch.tensor(1.3).double()])
def test_an_angle_is_found_as_number_scalar_or_batch(timestep):
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    assert scheduler.index_for_timestep(timestep) == 1


def test_of_an_angle_held_twice_the_second_is_meant_as_in_diffusers():
    repeated = torch.tensor([1.5, 1.0, 1.0, 0.0])
    for scheduler in (SCMScheduler(), diffusers.SCMScheduler()):
        assert scheduler.index_for_timestep(1.0, repeated) == 2


def test_half_precision_steps_are_computed_in_float32():
    half = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        scheduler = SCMScheduler()
        scheduler.set_timesteps(2)
        generator = torch.Generator().manual_seed(1)
        outputs.append(scheduler.step(half[0].to(dtype), 1.3, half[1].to(dtype), generator, return_dict=False))
    for bfloat16, float32, float64 in zip(*outputs, strict=True):
        assert (bfloat16.dtype, float64.dtype) == (torch.float32, torch.float64)
        assert torch.equal(bfloat16, float32)


def test_assigned_timesteps_are_those_that_are_stepped_through():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    scheduler.timesteps = torch.tensor([0.0, 0.0])
    scheduler.set_begin_index(0)
    sample = torch.ones(1, 2)
    assert torch.equal(scheduler.step(torch.ones(1, 2), 0.0, sample).prev_sample, sample)


# --- configuration


@pytest.mark.parametrize(
    ("one", "other"), [(SCMScheduler, diffusers.SCMScheduler), (diffusers.SCMScheduler, SCMScheduler)]
)
def test_a_config_saved_by_either_library_is_loaded_by_the_other(one, other, tmp_path):
    written = one(num_train_timesteps=77, sigma_data=0.25)
    written.save_pretrained(tmp_path)
    saved = (tmp_path / "scheduler_config.json").read_text()
    for read in (other.from_pretrained(tmp_path), other.from_config(written.config)):
        assert type(read) is other
        assert (read.config.num_train_timesteps, read.config.sigma_data) == (77, 0.25)
        read.save_pretrained(tmp_path)
        assert (tmp_path / "scheduler_config.json").read_text() == saved


def test_a_flow_matching_scheduler_and_ours_are_made_from_each_others_config():
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCMScheduler(num_train_timesteps=77).config)
    assert flow.config.num_train_timesteps == 77
    assert SCMScheduler.from_config(flow.config).config.num_train_timesteps == 77


def test_a_deep_copy_steps_on_by_itself():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    sample = torch.ones(1, 2)
    scheduler.step(sample, 1.57080, sample)
    twin = copy.deepcopy(scheduler)
    twin.step(sample, 1.3, sample)
    twin.timesteps[0] = 0.1
    assert (scheduler.step_index, twin.step_index) == (1, 2)
    assert scheduler.timesteps[0] == pytest.approx(1.57080)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "whole number unless timesteps are given, got None"),
        ({"num_inference_steps": 2.0}, "whole number unless timesteps are given, got 2.0"),
        ({"num_inference_steps": 0}, "between 1 and 1000 .*, got 0"),
        ({"num_inference_steps": -3}, "between 1 and 1000 .*, got -3"),
        ({"num_inference_steps": 1001}, "between 1 and 1000 .*, got 1001"),
        ({"timesteps": np.linspace(1.5, 0, 1002)}, "between 1 and 1000 .*, got 1001"),
        ({"num_inference_steps": 4, "intermediate_timesteps": 1.3}, "there are 4: leave it out, or give all 5 angles"),
        ({"num_inference_steps": 1, "intermediate_timesteps": 1.0}, "there are 1: leave it out, or give all 2 angles"),
        ({"num_inference_steps": 2, "max_timesteps": None}, "angle in radians unless timesteps are given, got None"),
        ({"num_inference_steps": 2, "max_timesteps": 2.0}, r"must lie in \(0, pi/2\], got 2.0"),
        ({"num_inference_steps": 1, "max_timesteps": 0}, r"must lie in \(0, pi/2\], got 0"),
        ({"num_inference_steps": 1, "max_timesteps": math.nan}, r"must lie in \(0, pi/2\], got nan"),
        ({"num_inference_steps": 2, "max_timesteps": 1.2}, "got 1.2 .*and 1.3 .*: change one"),
        ({"num_inference_steps": 4, "max_timesteps": 1.3}, "got 1.3 .*and 1.3 .*: change one"),
        ({"num_inference_steps": 2, "intermediate_timesteps": 1.6}, "got 1.5708 .*and 1.6 .*: change one"),
        ({"num_inference_steps": 2, "intermediate_timesteps": 0.0}, "got 1.5708 .*and 0.0 .*: change one"),
        ({"num_inference_steps": 2, "intermediate_timesteps": math.nan}, "got 1.5708 .*and nan .*: change one"),
        ({"timesteps": [1.5, 0.0], "max_timesteps": 1.57080}, "leave out max_timesteps, got 1.5708"),
        ({"timesteps": [1.5, 1.0, 0.0], "intermediate_timesteps": 1.3}, "leave out intermediate_timesteps, got 1.3"),
        ({"timesteps": [1.5, 0.0], "num_inference_steps": 2}, "num_inference_steps=2 does not fit .* 2 angles"),
        ({"timesteps": [0.0, 0.5, 1.5]}, "must descend"),
        ({"timesteps": [1.5, 1.5, 0.0]}, "must descend"),
        ({"timesteps": [1.6, 0.0]}, r"must lie in \[0, pi/2\], got \[1.6"),
        ({"timesteps": [1.5, -0.1]}, r"must lie in \[0, pi/2\], got \[1.5, -0.1"),
        ({"timesteps": [1.5, math.nan, 0.0]}, r"must lie in \[0, pi/2\]"),
        ({"timesteps": [math.inf, 0.0]}, r"must lie in \[0, pi/2\]"),
        ({"timesteps": [1.5]}, r"at least two angles, .*, got \[1.5\]"),
        ({"timesteps": []}, r"at least two angles, .*, got \[\]"),
        ({"timesteps": 1.5}, "at least two angles, .*, got 1.5"),
        ({"timesteps": [[1.5, 0.0]]}, "at least two angles"),
        ({"timesteps": "1.5, 0"}, "must be a list of angles in radians, got '1.5, 0'"),
        ({"timesteps": ["max", 0]}, "must be a list of angles in radians, got .'max', 0."),
    ],
)
def test_set_timesteps_refuses_what_it_cannot_do_and_says_why(arguments, message):
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.num_inference_steps == 1  # a refusal changes nothing


def test_a_step_before_set_timesteps_is_refused():
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        SCMScheduler().step(torch.ones(1), 1.0, torch.ones(1))


@pytest.mark.parametrize("timestep", [1.2, math.nan, torch.tensor([1.57080, 1.3])])
def test_a_timestep_outside_the_timetable_is_refused(timestep):
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep must be one of \[1.5"):
        scheduler.step(torch.ones(2), timestep, torch.ones(2))


@pytest.mark.parametrize("begin_index", [-1, 1, 2])
def test_a_step_past_either_end_is_refused(begin_index):
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    scheduler.set_begin_index(begin_index)
    with pytest.raises(ValueError, match=f"no step starts at index {begin_index} of the 2 angles"):
        scheduler.step(torch.ones(2), 1.57080, torch.ones(2))


def test_a_step_too_many_is_refused():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    sample = scheduler.step(torch.ones(1, 2), 1.57080, torch.ones(1, 2)).prev_sample
    with pytest.raises(ValueError, match="no step starts at index 1 of the 2 angles"):
        scheduler.step(sample, 0.0, sample)


def test_a_velocity_of_another_shape_is_refused():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\) and \(3, 2\)"):
        scheduler.step(torch.ones(1, 2), 1.57080, torch.ones(3, 2))


def test_a_prediction_type_that_cannot_be_stepped_with_is_refused_at_construction():
    with pytest.raises(ValueError, match="must be 'trigflow' for SCMScheduler, got 'epsilon'"):
        SCMScheduler(prediction_type="epsilon")
