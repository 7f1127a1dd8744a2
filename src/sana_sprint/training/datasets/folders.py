"""A folder of pictures with captions beside them, or in tables of metadata, to records."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sana_sprint.training.datasets.records import Record, Span
from sana_sprint.training.datasets.skipped import Skipped

# Hugging Face's imagefolder has them, one in each folder: a row for each picture, which its file_name names.
TABLES = ("metadata.jsonl", "metadata.csv")
_FILE_COLUMN = "file_name"


def _rows(table: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with a name for messages."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        if table.suffix == ".csv":
            for number, row in enumerate(csv.DictReader(stream), start=2):
                yield f"{name}:{number}", row
            return
        for number, line in enumerate(stream, start=1):
            place = f"{name}:{number}"
            found = skipped.attempt(place, json.loads, line) if line.strip() else None
            if isinstance(found, dict):
                yield place, found
            elif found is not None:
                skipped.add(place, f"wanted a JSON object, got {line}")


def _listed(table: Path, folder: Path, skipped: Skipped) -> dict[Path, Record]:
    """The pictures that a table lists, and their records."""
    listed = {}
    for place, row in _rows(table, table.relative_to(folder).as_posix(), skipped):
        if not row.get(_FILE_COLUMN):
            skipped.add(place, f"has no {_FILE_COLUMN}")
            continue
        path = table.parent / row[_FILE_COLUMN]
        span = skipped.attempt(place, Span.whole, path)
        if span is not None:
            name = (table.parent.relative_to(folder) / row[_FILE_COLUMN]).as_posix()
            listed[path] = Record(name, {path.suffix[1:].lower(): span}, row)
    return listed


def folder_records(folder: Path, skipped: Skipped) -> list[Record]:
    """The examples of a folder and those below it, by name.

    A picture or latent that no `TABLES` list has its caption in a file of the same stem, .json or .txt. What begins
    with a dot is passed over.

    Args:
        folder: The folder; records are named relative to it.
        skipped: Where damaged tables and rows are noted.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    listed: dict[Path, Record] = {}
    for table in paths:
        if table.name in TABLES:
            name = table.relative_to(folder).as_posix()
            listed |= skipped.attempt(name, _listed, table, folder, skipped) or {}
    by_stem: dict[Path, dict[str, Span]] = {}
    for path in paths:
        if path not in listed:
            by_stem.setdefault(path.with_suffix(""), {})[path.suffix[1:].lower()] = Span.whole(path)
    records = list(listed.values())
    for stem, files in by_stem.items():
        record = Record(stem.relative_to(folder).as_posix(), files)
        if record.ending is not None:
            name = files[record.ending].path.relative_to(folder).as_posix()
            records.append(replace(record, name=name))
    return sorted(records, key=lambda record: record.name)
