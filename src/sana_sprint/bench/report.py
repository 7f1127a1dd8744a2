"""Rows of results to a table and a plot for people, and to one document for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_sprint.bench.measure import Side
from sana_sprint.bench.rows import Row, readable_seconds
from sana_sprint.bench.spread import Spread, ratios, spread
from sana_sprint.evaluation.plots import check_plotting
from sana_sprint.evaluation.tables import aligned
from sana_sprint.files import write_whole
from sana_sprint.sizes import readable_bytes

_HEADER = (
    "case",
    "model",
    "size",
    "batch",
    "ours",
    "diffusers",
    "times faster",
    "memory",
    "operations",
    "of peak",
    "error",
    "cosine",
)
_NOTHING = "-"


def share_of_peak(side: Side, peak: float) -> float:
    """Operations a second in the median round, over `peak` of them."""
    return side.counts.operations / spread(side.seconds).median / peak


def times_faster(row: Row) -> Spread | None:
    """Of the ratios of paired rounds, diffusers' seconds over ours."""
    if row.measured is None or row.measured.theirs is None:
        return None
    return spread(ratios(row.measured.theirs.seconds, row.measured.ours.seconds))


def table(rows: Sequence[Row], peak: float) -> list[str]:
    """The rows that were measured in lines, with a header.

    Medians with the quartiles in brackets; where two numbers stand in a cell, ours comes first.
    """
    cells = [_cells(row, peak) for row in rows if row.measured is not None]
    return aligned([_HEADER, *cells]) if cells else []


def remarks(rows: Sequence[Row]) -> list[str]:
    """What rows have to say beside numbers, in a line each."""
    lines = [f"{row.title}: {row.remark}" for row in rows if row.remark]
    return lines + [f"{row.title}: ours and diffusers' results differ" for row in rows if not row.agrees]


def _cells(row: Row, peak: float) -> list[str]:
    measured, faster = row.measured, times_faster(row)
    assert measured is not None
    sides = [side for side in (measured.ours, measured.theirs) if side is not None]
    agreement = measured.agreement
    return [
        row.case,
        row.model or _NOTHING,
        row.size_text or _NOTHING,
        str(row.batch),
        *(_NOTHING if side is None else _times(spread(side.seconds)) for side in (measured.ours, measured.theirs)),
        _NOTHING if faster is None else f"{faster.median:.2f} ({faster.lower:.2f}, {faster.upper:.2f})",
        " : ".join(_memory(side.counts.peak_bytes) for side in sides),
        " : ".join(_operations(side.counts.operations) for side in sides),
        " : ".join(f"{100 * share_of_peak(side, peak):.0f} %" for side in sides),
        *((_NOTHING,) * 2 if agreement is None else (f"{agreement.relative_error:.1e}", f"{agreement.cosine:.6f}")),
    ]


def _times(times: Spread) -> str:
    median, lower, upper = (readable_seconds(seconds) for seconds in (times.median, times.lower, times.upper))
    return f"{median} ({lower}, {upper})"


def _memory(count: int | None) -> str:
    return _NOTHING if count is None else readable_bytes(count)


def _operations(count: float) -> str:
    """In units of 10^12 or 10^9."""
    return f"{count / 1e12:.2f} T" if count >= 1e11 else f"{count / 1e9:.2f} G"


def legend(peak: float, machine: Mapping[str, Any], dtype: str) -> list[str]:
    """What the cells of the table are, in lines."""
    memory = "as CUDA's allocator saw it" if machine["device"] == "cuda" else "counted tensor by tensor"
    return [
        "times: medians (quartiles); ours : diffusers",
        f"memory: the most above the weights, {memory}",
        f"of peak: of {_operations(peak)} operations a second, the speed of a large matrix product in {dtype}",
    ]


def document(rows: Sequence[Row], peak: float, **about: Any) -> dict[str, Any]:
    """All that was measured, with what it is about; holds nothing but what JSON has words for."""
    return {
        **about,
        "peak_operations_per_second": peak,
        "rows": [_row_document(row, peak) for row in rows],
        "agrees": all(row.agrees for row in rows),
    }


def _row_document(row: Row, peak: float) -> dict[str, Any]:
    faster, measured = times_faster(row), row.measured
    agreement = measured.agreement if measured else None
    return {
        "case": row.case,
        "model": row.model,
        "size": row.size and list(row.size),
        "batch": row.batch,
        "ours": _side_document(measured.ours if measured else None, peak),
        "theirs": _side_document(measured.theirs if measured else None, peak),
        "times_faster": faster and faster._asdict(),
        "agreement": agreement and {name: _finite(value) for name, value in agreement._asdict().items()},
        "agrees": row.agrees,
        "remark": row.remark,
    }


def _side_document(side: Side | None, peak: float) -> dict[str, Any] | None:
    if side is None:
        return None
    return {
        "seconds": side.seconds,
        **spread(side.seconds)._asdict(),
        "operations": side.counts.operations,
        "share_of_peak": share_of_peak(side, peak),
        "peak_bytes": side.counts.peak_bytes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG with two bars a row, ours and diffusers', of median seconds on a logarithmic axis, with quartiles.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.measured is not None]
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for offset, name in ((-0.2, "ours"), (0.2, "diffusers")):
        places, spreads = [], []
        for place, row in enumerate(shown):
            assert row.measured is not None
            side = row.measured.ours if name == "ours" else row.measured.theirs
            if side is not None:
                places.append(place + offset)
                spreads.append(spread(side.seconds))
        medians = [times.median for times in spreads]
        errors = [[times.median - times.lower for times in spreads], [times.upper - times.median for times in spreads]]
        axes.barh(places, medians, height=0.38, xerr=errors, label=name, capsize=2)
    for place, row in enumerate(shown):
        faster = times_faster(row)
        if faster is not None:
            axes.annotate(
                f" {faster.median:.2f} ×",
                (1, place),
                xycoords=("axes fraction", "data"),
                va="center",
                annotation_clip=False,
            )
    axes.set_yticks(range(len(shown)), [row.title for row in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds, median and quartiles; on the right, how many times faster")
    axes.set_title(title)
    axes.legend()
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def write(folder: Path, title: str, rows: Sequence[Row], contents: dict[str, Any]) -> None:
    """Write the document to a folder as bench.json and, if anything was measured, the plot as bench.png."""
    text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
    write_whole(folder / "bench.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    if any(row.measured for row in rows):
        plot(rows, folder / "bench.png", title)
