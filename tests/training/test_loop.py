"""The loop: resumes to the bit, keeps groups apart, skips what is not finite, and writes what it promises."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_training
import torch
from accelerate.utils import DistributedType
from torch import nn

from sana_sprint.training.distillation import AngleDistribution, Distillation
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowObjective, FlowSettings, GuidanceObjective
from sana_sprint.training.loop import Objective, check_accelerator, train
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.training.settings import LoopSettings

LOOP = LoopSettings(steps=12, batch_size=4, precision="fp32", checkpoint_every=4, log_every=1)
LINE = OptimiserSettings(learning_rate=1e-2, warmup_steps=3)
CRITIC = OptimiserSettings(learning_rate=2e-3, warmup_steps=0, schedule="constant", clip_norm=0.5)


class Regression(Objective[nn.Module]):
    """A small network that fits a noisy sum which a frozen one has scaled, and a critic that follows it.

    `breaks` names, for steps counted from 0, what is not finite there: the loss, or the gradient of the critic alone.
    """

    def __init__(self, breaks=None, stop_at=None, critic=CRITIC, line=LINE):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.critic = nn.Linear(1, 1)
        self.scale = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout()).requires_grad_(False)
        self.scale[0].weight.fill_(1.0)
        self.breaks = breaks or {}
        self.stop_at = stop_at
        self.settings = line, critic
        self.seen = []

    def forward(self, draws: Draws):
        if draws.step == self.stop_at:
            raise KeyboardInterrupt
        x = draws.normal((3,))
        target = self.scale(x.sum(1, keepdim=True)) + 0.1 * draws.normal((1,))
        fitted = self.line(x)
        self.seen.append(fitted.dtype)
        losses = {"line": (fitted - target).square().mean()}
        losses["critic"] = (self.critic(target) - fitted.detach()).square().mean()
        loss = losses["line"] + losses["critic"]
        broken = self.breaks.get(draws.step)
        if broken == "gradient":
            # The root of nothing is nothing, and infinitely steep.
            loss = loss + (self.critic.weight - self.critic.weight.detach()).abs().sqrt().sum()
        return {"loss": loss * torch.nan if broken == "loss" else loss, **losses}

    def groups(self):
        line, critic = self.settings
        return [
            ParameterGroup("line", trainable(self.line), line, [self.line[0].weight]),
            ParameterGroup("critic", trainable(self.critic), critic),
        ]

    def averaged(self):
        return self.line


def run(folder, settings=LOOP, validate=None, **objective):
    regression = Regression(**objective)
    return regression, train(regression, settings, folder, "test", torch.device("cpu"), validate)


def weights(module):
    return torch.cat([value.detach().flatten() for value in module.state_dict().values()])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_a_run_that_stopped_and_went_on_ends_with_the_same_weights(tmp_path, stop_at):
    whole, whole_average = run(tmp_path / "whole", breaks={6: "loss"})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=stop_at, breaks={6: "loss"})
    resumed, average = run(tmp_path / "stopped", breaks={6: "loss"})
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(weights(average), weights(whole_average))
    entries = [
        [{**entry, "images_per_second": 0} for entry in log_of(tmp_path / name)] for name in ("whole", "stopped")
    ]
    assert entries[0] == entries[1]
    assert [entry["step"] for entry in entries[0]] == list(range(1, 13))


def test_training_fits_what_it_is_given(tmp_path):
    run(tmp_path, replace(LOOP, steps=200, checkpoint_every=200))
    losses = [entry["line"] for entry in log_of(tmp_path)]
    # The noise on the target leaves 0.01; the untrained network starts near the variance of the sum, 3.
    assert sum(losses[-20:]) / 20 < 0.1 < 1.0 < sum(losses[:5]) / 5


def test_the_average_is_of_one_part_and_lags_behind_it_untrained(tmp_path):
    regression, average = run(tmp_path)
    assert average.state_dict().keys() == regression.line.state_dict().keys()
    assert not torch.equal(weights(regression.line), weights(average))
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.parametrize(("ema_warmup", "decays"), [(True, (1 / 10, 2 / 11)), (False, (0.9, 0.9))])
def test_the_average_starts_as_the_mean_of_few_steps_or_where_training_does(tmp_path, ema_warmup, decays):
    seen = []
    run(
        tmp_path,
        replace(LOOP, steps=2, ema_decay=0.9, ema_warmup=ema_warmup, validate_every=1),
        validate=lambda average, step: seen.append(weights(average).clone()),
    )
    states = [weights(Regression().line)]
    for steps in (1, 2):
        # The first steps of a run do not know its length while the rates rise.
        states.append(weights(run(tmp_path / str(steps), replace(LOOP, steps=steps))[0].line))
    first = states[0].lerp(states[1], 1 - decays[0])
    second = first.lerp(states[2], 1 - decays[1])
    torch.testing.assert_close(torch.stack(seen), torch.stack([first, second]))


def test_groups_have_rates_warm_up_and_clipping_of_their_own(tmp_path):
    run(tmp_path)
    log = log_of(tmp_path)
    assert [entry["line_learning_rate"] for entry in log[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2], rel=1e-4)
    assert log[-1]["line_learning_rate"] < 1e-3
    assert log[-1]["line_matrix_learning_rate"] == pytest.approx(log[-1]["line_learning_rate"] / 5, rel=1e-4)
    assert {entry["critic_learning_rate"] for entry in log} == {2e-3}
    assert "critic_matrix_learning_rate" not in log[0]
    assert log[0]["line_gradient_norm"] != log[0]["critic_gradient_norm"] > 0


def test_a_change_to_one_group_changes_nothing_of_the_other(tmp_path):
    regression, _ = run(tmp_path / "first")
    for number, change in enumerate([{"learning_rate": 0.0}, {"betas": (0.5, 0.5)}, {"clip_norm": 1e-3}]):
        other, _ = run(tmp_path / str(number), critic=replace(CRITIC, **change))
        assert torch.equal(weights(other.line), weights(regression.line))
        assert not torch.equal(weights(other.critic), weights(regression.critic))


def test_a_folder_of_other_settings_is_refused_by_their_names(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"other settings or data \(critic\.betas, line\.learning_rate, seed\)"):
        run(
            tmp_path,
            replace(LOOP, seed=1),
            critic=replace(CRITIC, betas=(0.5, 0.5)),
            line=replace(LINE, learning_rate=1),
        )


def test_a_folder_of_a_run_that_learned_from_something_else_is_refused_by_its_name(tmp_path):
    def begun(**sources):
        loop = replace(LOOP, steps=1)
        return train(Regression(), loop, tmp_path, "test", torch.device("cpu"), sources=sources)

    begun(data="1", teacher="2")
    begun(data="1", teacher="2")
    with pytest.raises(ValueError, match=r"other settings or data \(data\)"):
        begun(data="3", teacher="2")
    with pytest.raises(ValueError, match=r"other settings or data \(prior\)"):
        begun(data="1", teacher="2", prior="4")


FLOW = FlowSettings(config={}, loop=LOOP, optimiser=LINE, guidance_loop=LOOP, guidance_optimiser=LINE)


def flow(**changes):
    return FlowObjective(tiny_training.tiny_teacher(), tiny_training.tiny_data(), replace(FLOW, **changes))


def guidance(**changes):
    student, teacher = tiny_training.tiny_teacher(), tiny_training.tiny_teacher()
    return GuidanceObjective(student, teacher, tiny_training.tiny_data(), replace(FLOW, **changes))


def distillation(**changes):
    settings = replace(tiny_training.DISTILLATION, **changes)
    return Distillation(tiny_training.tiny_teacher(), tiny_training.tiny_data(), settings)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (flow, {"caption_dropout": 0.2, "time_mean": 0.0, "use_muon": False}),
        (guidance, {"guidance_range": (1.0, 6.0), "time_mean": 0.0}),
        (
            distillation,
            {
                "adversarial_weight": 1.0,
                "guidance_scales": (4.5,),
                "head_blocks": (0,),
                "student_angles": AngleDistribution(mean=0.0, std=1.0),
            },
        ),
    ],
)
def test_a_folder_of_an_objective_with_other_settings_is_refused_by_their_names(tmp_path, objective, changes):
    def last_step(**changes):
        loop = replace(LOOP, steps=1)
        return weights(train(objective(**changes), loop, tmp_path, "test", torch.device("cpu")))

    first = last_step()
    with pytest.raises(ValueError, match=rf"other settings or data \({', '.join(sorted(changes))}\)"):
        last_step(**changes)
    assert torch.equal(last_step(compile=True), first)


def test_a_run_goes_on_with_other_settings_of_what_does_not_change_its_steps(tmp_path):
    _, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=7)
    free = {"checkpoint_every": 3, "keep": 1, "log_every": 5, "validate_every": 2, "tensorboard": True}
    _, average = run(tmp_path / "stopped", replace(LOOP, **free))
    assert torch.equal(weights(average), weights(whole))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_no_group_and_is_counted(tmp_path, broken):
    constant = {"line": replace(LINE, schedule="constant"), "critic": CRITIC}
    before, average_before = run(tmp_path / "before", replace(LOOP, steps=5), **constant)
    after, average_after = run(tmp_path / "after", replace(LOOP, steps=6), breaks={5: broken}, **constant)
    assert torch.equal(weights(after), weights(before))
    assert torch.equal(weights(average_after), weights(average_before))
    log = log_of(tmp_path / "after")
    assert [entry["skipped"] for entry in log] == [0, 0, 0, 0, 0, 1]
    assert (log[-1]["loss"] is None) == (broken == "loss")
    assert log[-1]["critic_gradient_norm"] is None


def test_twenty_steps_in_a_row_that_are_not_finite_end_the_run_and_name_the_last(tmp_path):
    settings = replace(LOOP, steps=40)
    forgiven = dict.fromkeys(range(2, 21), "gradient")
    run(tmp_path / "forgiven", settings, breaks=forgiven)
    assert log_of(tmp_path / "forgiven")[-1]["skipped"] == 19
    with pytest.raises(FloatingPointError, match="test: 20 steps in a row were not finite, up to step 22: critic_grad"):
        run(tmp_path / "ended", settings, breaks={**forgiven, 21: "gradient"})


def test_only_what_is_trained_is_in_training_mode_and_in_the_state(tmp_path):
    regression, _ = run(tmp_path)
    modes = {name: module.training for name, module in regression.named_children()}
    assert modes == {"line": True, "critic": True, "scale": False}
    saved = torch.load(tmp_path / "state-000012.pt", weights_only=True)["network"]
    assert saved.keys() == {name for name, _ in regression.named_parameters() if not name.startswith("scale.")}


def test_a_parameter_in_no_group_is_a_mistake(tmp_path):
    regression = Regression()
    regression.scale.requires_grad_(True)
    with pytest.raises(AssertionError, match="groups and trained parameters differ"):
        train(regression, LOOP, tmp_path, "test", torch.device("cpu"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_products_are_computed_in_the_precision_asked_for(tmp_path, precision, dtype):
    regression, _ = run(tmp_path, replace(LOOP, steps=1, precision=precision))
    assert regression.seen == [dtype]
    assert {parameter.dtype for parameter in regression.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "precision must be one of bf16, fp32, got 'fp16'"),
        ({"keep": 0}, "keep must be 1 or more, got 0"),
        ({"steps": -1}, "steps must be 1 or more, got -1"),
        ({"validate_every": 0}, "validate_every must be 1 or more, got 0"),
        ({"accumulation": 0}, "accumulation must be 1 or more, got 0"),
        ({"accumulation": 3}, "batch_size must be a multiple of processes × micro-steps, 1 × 3, got 4"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LOOP, **changes)


def test_deepspeed_is_refused():
    # A stand-in for accelerate's own, which cannot be made without DeepSpeed.
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, is_fsdp2=False)
    with pytest.raises(ValueError, match="DeepSpeed clips and updates by itself.*: launch with DDP or FSDP 2"):
        check_accelerator(accelerator, Regression().groups())


def test_micro_steps_make_the_steps_of_the_whole_batch(tmp_path):
    tiny_training.run(tmp_path / "whole")
    tiny_training.run(tmp_path / "cut", replace(tiny_training.LOOP, accumulation=4))
    whole, cut = (
        torch.tensor([[entry["loss"], entry["transformer_gradient_norm"]] for entry in log_of(tmp_path / name)])
        for name in ("whole", "cut")
    )
    # In float32 and another order of sums, which six updates carry on.
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)
    assert len(whole) == 6


def test_the_newest_states_are_kept_and_nothing_unfinished_is_taken_for_one(tmp_path):
    run(tmp_path, replace(LOOP, checkpoint_every=2, keep=3))
    kept = ["state-000008.pt", "state-000010.pt", "state-000012.pt"]
    assert sorted(path.name for path in tmp_path.glob("state*")) == kept
    (tmp_path / "state-000014.pt.partial").write_bytes(b"half of a st")
    regression, _ = run(tmp_path)
    assert regression.seen == []


def test_the_best_average_is_kept_with_its_score_and_step(tmp_path):
    scores = {3: 0.2, 6: 0.7, 9: 0.5, 12: None}
    averages = {}

    def validate(average, step):
        averages[step] = weights(average).clone()
        return scores[step]

    settings = replace(LOOP, validate_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings, validate, stop_at=8)
    # It goes on after 4 steps: 6 is validated again, and 9, though better than 3, is not the best.
    _, average = run(tmp_path, settings, validate)
    assert list(averages) == [3, 6, 9, 12]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["score"]) == (6, 0.7)
    average.load_state_dict(best["average"])
    assert torch.equal(weights(average), averages[6])
    assert {entry["step"]: entry["score"] for entry in log_of(tmp_path) if "score" in entry} == {3: 0.2, 6: 0.7, 9: 0.5}


def test_the_best_score_is_remembered_when_a_run_goes_on(tmp_path):
    settings = replace(LOOP, validate_every=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings, lambda _, step: 1.0, stop_at=5)
    run(tmp_path, settings, lambda _, step: 0.5)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 4


def test_a_line_that_was_never_finished_is_forgotten(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=4)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    run(tmp_path)
    assert [entry["step"] for entry in log_of(tmp_path)] == list(range(1, 13))


def test_tensorboard_shows_every_reported_value_of_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(LOOP, tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings, stop_at=7)
    run(tmp_path, settings)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == log_of(tmp_path)[0].keys() - {"step"}
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(entry["step"], pytest.approx(entry["loss"], rel=1e-5)) for entry in log_of(tmp_path)]


def test_tensorboard_without_its_package_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"need its package: pip install 'sana-sprint\[train\]'"):
        run(tmp_path, replace(LOOP, tensorboard=True))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_with_speed_and_time_left_and_nothing_else_does(tmp_path, monkeypatch, capfd):
    run(tmp_path / "elsewhere")
    assert capfd.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(tmp_path / "terminal")
    last = terminal.getvalue().splitlines()[-1]
    assert "test: 100%" in last
    assert "12/12" in last
    assert "images/s" in last
    assert "<" in last  # between the time gone and the time left
