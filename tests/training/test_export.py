"""How a checkpoint was made, in a file beside it: nothing is lost, and lists do not take a line a number."""

import json
from pathlib import Path

from sana_sprint.training.export import RECORD, record_of, write_record
from sana_sprint.training.settings import LoopSettings


def test_a_record_is_read_as_it_was_written_and_lists_stand_on_one_line(tmp_path):
    record = {
        "recipe": {"data": Path("cache"), "widths": (1, 2), "none": {}},
        3: {"loss": [0.5, None]},
        "note": "a\n{b}",
    }
    write_record(tmp_path, record)
    text = (tmp_path / RECORD).read_text(encoding="utf-8")
    assert json.loads(text) == {
        "recipe": {"data": "cache", "widths": [1, 2], "none": {}},
        "3": {"loss": [0.5, None]},
        "note": "a\n{b}",
    }
    assert '\n    "loss": [0.5, null]\n' in text
    assert list(json.loads(text)) == ["recipe", "3", "note"]


def test_losses_are_columns_and_null_where_a_step_has_none(tmp_path):
    log = tmp_path / "log.jsonl"
    entries = [{"step": step, "loss": step / 2} for step in range(1, 122)]
    entries[-1]["skipped"] = 1
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    losses = record_of(LoopSettings(steps=121, batch_size=1), {"flow": log}, "cpu")["losses"]["flow"]
    assert list(losses) == ["step", "loss", "skipped"]
    assert losses["step"] == list(range(1, 122, 3))
    assert losses["loss"][-1] == 60.5
    assert losses["skipped"] == [None] * 40 + [1]
