"""Rows whose numbers are known to a table, remarks, a document and a plot."""

import json
import math
import sys

import pytest

from sana_sprint.bench import report
from sana_sprint.bench.agreement import Agreement
from sana_sprint.bench.measure import Counts, Measured, Side
from sana_sprint.bench.rows import Row, readable_seconds

PEAK = 1e12
OURS = Side(seconds=[1.0, 2.0, 3.0], counts=Counts(10**12, 2 * 10**9))
THEIRS = Side(seconds=[3.0, 4.0, 5.0], counts=Counts(2 * 10**12, None))
BOTH = Row(
    case="step",
    model="1.6b",
    size=(1024, 768),
    batch=4,
    measured=Measured(ours=OURS, theirs=THEIRS, agreement=Agreement(0.0012, 0.999999)),
)
ALONE = Row(
    case="decode",
    model=None,
    size=(4096, 4096),
    batch=1,
    measured=Measured(ours=OURS),
    remark="without diffusers: no memory",
)
REFUSED = Row(case="text", model=None, size=None, batch=1, remark="refused: too large")
DIFFERS = BOTH._replace(
    measured=Measured(ours=OURS, theirs=THEIRS, agreement=Agreement(math.nan, math.nan)), agrees=False
)


def test_the_table_shows_medians_with_quartiles_and_both_sides():
    header, both, alone = report.table([BOTH, ALONE, REFUSED], PEAK)
    assert header.split()[:4] == ["case", "model", "size", "batch"]
    assert both.split("  ")[0] == "step"
    for cell in (
        "1024x768",
        "2.00 s (1.50 s, 2.50 s)",
        "4.00 s (3.50 s, 4.50 s)",
        "2.00 (1.83, 2.50)",  # of 3/1, 4/2 and 5/3
        "2.00 GB : -",
        "1.00 T : 2.00 T",
        "50 % : 50 %",
        "1.2e-03",
        "0.999999",
    ):
        assert cell in both
    assert "diffusers" in header
    assert alone.split()[-2:] == ["-", "-"]


def test_small_numbers_of_operations_have_a_smaller_unit():
    quick = BOTH._replace(measured=Measured(ours=Side(seconds=[1.0], counts=Counts(21 * 10**7, None))))
    assert "0.21 G" in report.table([quick], PEAK)[1]


@pytest.mark.parametrize(("device", "memory"), [("cpu", "counted tensor by tensor"), ("cuda", "CUDA's allocator")])
def test_the_legend_says_how_memory_was_seen_and_what_the_peak_is(device, memory):
    _, of_memory, of_peak = report.legend(PEAK, {"device": device}, "bfloat16")
    assert memory in of_memory
    assert "1.00 T operations a second" in of_peak
    assert "bfloat16" in of_peak


def test_nothing_measured_is_no_table():
    assert report.table([REFUSED], PEAK) == []


def test_remarks_are_a_line_for_what_is_missing_and_for_what_differs():
    assert report.remarks([BOTH, ALONE, REFUSED, DIFFERS]) == [
        "decode, 4096x4096, batch 1: without diffusers: no memory",
        "text, batch 1: refused: too large",
        "step, 1.6b, 1024x768, batch 4: ours and diffusers' results differ",
    ]


def test_the_document_holds_every_sample_and_survives_json():
    found = report.document([BOTH, ALONE, REFUSED], PEAK, quick=False, machine={"name": "a machine"})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {"quick", "machine", "peak_operations_per_second", "rows", "agrees"}
    assert found["agrees"] is True
    both, alone, refused = found["rows"]
    assert both["ours"] == {
        "seconds": [1.0, 2.0, 3.0],
        "lower": 1.5,
        "median": 2.0,
        "upper": 2.5,
        "operations": 10**12,
        "share_of_peak": 0.5,
        "peak_bytes": 2 * 10**9,
    }
    assert both["theirs"]["peak_bytes"] is None
    assert both["times_faster"]["median"] == 2.0
    assert both["agreement"] == {"relative_error": 0.0012, "cosine": 0.999999}
    assert (both["model"], both["size"], both["batch"], both["agrees"]) == ("1.6b", [1024, 768], 4, True)
    assert (alone["theirs"], alone["times_faster"], alone["agreement"]) == (None, None, None)
    assert (refused["ours"], refused["size"], refused["remark"]) == (None, None, "refused: too large")
    assert both.keys() == alone.keys() == refused.keys()


def test_a_difference_makes_the_whole_document_disagree_in_valid_json():
    found = report.document([BOTH, DIFFERS], PEAK)
    assert found["agrees"] is False
    assert found["rows"][1]["agreement"] == {"relative_error": None, "cosine": None}
    json.dumps(found, allow_nan=False)


def test_the_plot_is_a_png_and_the_document_lies_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [BOTH, ALONE, REFUSED]
    contents = report.document(rows, PEAK)
    report.write(tmp_path, "a machine", rows, contents)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "bench.json").read_text()) == contents
    assert len(list(tmp_path.iterdir())) == 2


def test_without_anything_measured_there_is_no_plot(tmp_path):
    report.write(tmp_path, "a machine", [REFUSED], report.document([REFUSED], PEAK))
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'sana-sprint\[train\]'"):
        report.check_plotting()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (1.0, "1.00 s"), (0.5, "500 ms"), (0.0123, "12.3 ms"), (0.00456, "4.56 ms"), (100.2, "100 s")],
)
def test_times_have_three_digits(seconds, text):
    assert readable_seconds(seconds) == text
