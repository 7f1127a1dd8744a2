"""Which rows there are, what does not fit, and that a row says when results differ."""

import pytest
import torch

from sana_sprint.bench.agreement import BOUNDS, FLOAT8_BOUND
from sana_sprint.bench.cases import CASES, Case, Runs
from sana_sprint.bench.needs import Needs
from sana_sprint.bench.session import Session, jobs_of
from sana_sprint.memory.stages import Workload
from sana_sprint.quantisation import float8

QUIET = len  # takes a line and does nothing with it


def rows_of(settings):
    return list(Session(settings, QUIET).rows())


def test_cases_are_repeated_only_over_what_makes_a_difference(configs, make_settings):
    settings = make_settings(
        models={"one": configs, "two": configs}, sizes=((64, 64), (128, 64)), batches=(1, 2), cases=CASES[:4]
    )
    titles = [job.row.title for job in jobs_of(settings)]
    assert len(set(titles)) == len(titles) == 2 + 2 + 8 + 4
    assert titles[:2] == ["text, new prompt, batch 1", "text, new prompt, batch 2"]
    assert "step, two, 128x64, batch 2" in titles
    assert "decode, 128x64, batch 2" in titles


def test_every_case_gives_a_row_that_agrees_and_is_told_of(make_settings):
    lines: list[str] = []
    rows = list(Session(make_settings(), lines.append).rows())
    assert [row.case for row in rows] == [case.name for case in CASES]
    assert all(row.agrees and row.remark is None and row.measured.theirs for row in rows)
    assert all(row.measured.ours.counts.peak_bytes for row in rows)
    assert lines[0] == "[1/7] text, new prompt, batch 1"
    assert lines[1].startswith("[1/7] ours ")
    assert ", diffusers " in lines[1]


def test_what_does_not_fit_is_refused_and_others_go_on(configs, make_settings, case):
    size = Workload(height=64, width=64, dtype=torch.float32)
    needed = Needs(configs, size).of_theirs(["transformer"])
    rows = rows_of(make_settings(cases=(case("picture, 1 step"), case("step")), memory=needed))
    assert rows[0].measured is None
    assert rows[0].remark.startswith("refused: it needs ")
    assert rows[0].remark.endswith(" are free")
    assert rows[1].measured.theirs is not None


def test_where_only_diffusers_does_not_fit_ours_is_measured_alone(configs, make_settings, case):
    needs = Needs(configs, Workload(height=256, width=256, dtype=torch.float32))
    between = (needs.of_ours(["vae"]) + needs.of_theirs(["vae"])) // 2
    (row,) = rows_of(make_settings(cases=(case("decode"),), sizes=((256, 256),), memory=between))
    assert row.measured.ours.seconds
    assert row.measured.theirs is None
    assert row.remark.startswith("without diffusers: it needs ")


def test_an_altered_weight_makes_a_row_that_does_not_agree(make_settings, case):
    decode = case("decode")

    def build(pair, size, seed):
        head = pair.theirs.vae.decoder.conv_out
        head.weight = torch.nn.Parameter(head.weight * 1.001, requires_grad=False)
        return decode.build(pair, size, seed)

    altered = Case(name="altered", group="decode", networks=decode.networks, build=build)
    rows = rows_of(make_settings(cases=(decode, altered)))
    assert [row.agrees for row in rows] == [True, False]


def test_a_case_of_ones_own_needs_no_counterpart(make_settings, case):
    build = case("decode").build
    alone = Case(
        name="ours alone", group="decode", networks=("vae",), build=lambda *args: Runs(build(*args).ours, None)
    )
    (row,) = rows_of(make_settings(cases=(alone,)))
    assert row.remark == "without diffusers: it has no such thing"
    assert row.agrees


def test_compiled_steps_agree_and_their_memory_is_not_known(make_settings, case, monkeypatch):
    # The compiler's front alone: code for the CPU would need a C++ compiler and minutes.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    (row,) = rows_of(make_settings(cases=(case("step"),), compiles=True))
    assert row.agrees
    assert row.measured.ours.counts.operations > 0
    assert row.measured.ours.counts.peak_bytes is None


def test_float8_rounds_our_transformer_alone_and_its_error_is_shown(make_settings, case):
    pytest.importorskip("torchao", reason="torchao is not installed")
    step, decode = rows_of(make_settings(cases=(case("step"), case("decode")), float8=True))
    assert step.agrees
    assert BOUNDS[torch.float32] < step.measured.agreement.relative_error < FLOAT8_BOUND
    assert decode.measured.agreement.holds(BOUNDS[torch.float32])


def test_float8_without_torchao_is_refused_at_once(make_settings, monkeypatch):
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="float8 needs torchao"):
        make_settings(float8=True)


def test_sizes_without_cells_are_refused(make_settings):
    with pytest.raises(ValueError, match="multiples of 32 pixels, got 100x64"):
        make_settings(sizes=((64, 64), (100, 64)))
