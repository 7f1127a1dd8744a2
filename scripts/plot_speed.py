"""Documents that `sana-sprint bench` wrote to one plot of all their rows.

cd docs/benchmarks
python ../../scripts/plot_speed.py speed-zen5-{1,decode,2048,512-batch-10}.json --output ../images/speed.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sana_sprint.bench.measure import Counts, Measured, Side
from sana_sprint.bench.report import plot
from sana_sprint.bench.rows import Row


def side_of(document: dict[str, Any]) -> Side:
    counts = Counts(document["operations"], document["peak_bytes"])
    return Side(seconds=document["seconds"], counts=counts)


def rows_of(document: dict[str, Any]) -> list[Row]:
    """What was measured on both sides, of a document."""
    return [
        Row(
            case=row["case"],
            model=row["model"],
            size=row["size"] and tuple(row["size"]),
            batch=row["batch"],
            measured=Measured(ours=side_of(row["ours"]), theirs=side_of(row["theirs"])),
        )
        for row in document["rows"]
        if row["ours"] and row["theirs"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in options.documents]
    about = documents[0]
    machine = about["machine"]
    title = f"{machine['name']}, {machine['threads']} threads, {about['dtype']}, diffusers {machine['diffusers']}"
    plot([row for document in documents for row in rows_of(document)], options.output, title)


if __name__ == "__main__":
    main()
