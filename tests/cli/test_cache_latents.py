"""`sana-sprint cache-latents`: a folder of pictures to a cache, in parts, again, and after being killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_sprint.cli.main import main
from sana_sprint.training.datasets.cached import CachedLatents

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of so many pictures with captions."""

    def make(count: int) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
            (folder / f"{number:03d}.txt").write_text(f"a red circle {number}")
        return folder

    return make


def arguments(source, model, output, *more):
    fixed = ["--size", "64", "--captions-tokens", "40", "--batch-size", "2", "--device", "cpu"]
    return ["cache-latents", str(source), "--model", model, "--output", str(output), *fixed, *more]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_it_says_in_one_line_what_was_written_and_names_what_was_skipped(pictures, model_folder, tmp_path, capsys):
    source, output = pictures(5), tmp_path / "cache"
    (source / "002.png").write_bytes(b"junk")
    assert main(arguments(source, model_folder, output)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote 4 examples to {output}, skipped 1 (listed in skipped-0-of-1.txt)\n"
    assert "sana-sprint: skipped: 002.png: is no picture of a known format\n" in printed.err
    assert len(CachedLatents(output)) == 4

    assert main(arguments(source, model_folder, output)) == 0
    assert capsys.readouterr().out == f"wrote 0 examples to {output}, skipped 0, 5 were there\n"


def test_captions_that_were_cut_are_counted(pictures, model_folder, tmp_path, capsys):
    assert main(arguments(pictures(2), model_folder, tmp_path / "cache", "--captions-tokens", "4")) == 0
    assert ", cut 2 captions to 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["option", "launcher"])
def test_parts_make_together_what_one_process_makes(how, pictures, model_folder, tmp_path, monkeypatch):
    source, small = pictures(5), ("--examples-per-shard", "2")
    assert main(arguments(source, model_folder, tmp_path / "whole", *small)) == 0
    for part in range(2):
        options = ["--shard", f"{part}/2"] if how == "option" else []
        if how == "launcher":
            monkeypatch.setenv("RANK", str(part))
            monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments(source, model_folder, tmp_path / "parts", *small, *options)) == 0
        assert len(shards(tmp_path / "parts")) == [2, 3][part]
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")


def test_a_process_that_is_killed_leaves_whole_shards_and_the_next_one_goes_on(pictures, model_folder, tmp_path):
    source, small = pictures(120), ("--examples-per-shard", "2")
    command = [sys.executable, "-m", "sana_sprint.cli.main"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, *arguments(source, model_folder, output, *small)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while not shards(output) and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = shards(output)
    assert 0 < len(left) < 60
    with pytest.raises(ValueError, match="not finished"):
        CachedLatents(output)

    assert main(arguments(source, model_folder, output, *small)) == 0
    assert main(arguments(source, model_folder, tmp_path / "whole", *small)) == 0
    finished = shards(output)
    assert finished == shards(tmp_path / "whole")
    assert left.items() <= finished.items()
    assert not list(output.glob("*.partial"))
    assert len(CachedLatents(output)) == 120


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--captions-tokens", "30"], "made with other settings (captions_tokens)"),
        (["--size", "60"], "multiples of 8, got 60x60"),
        (["--device", "abacus"], "abacus"),
        (["--model", "./missing"], "no folder ./missing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(changed, named, pictures, model_folder, tmp_path, capsys):
    source = pictures(2)
    assert main(arguments(source, model_folder, tmp_path / "cache")) == 0
    before = shards(tmp_path / "cache")
    capsys.readouterr()
    assert main([*arguments(source, model_folder, tmp_path / "cache"), *changed]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("sana-sprint: error: ")
    assert named in printed.err
    assert shards(tmp_path / "cache") == before


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/2/3", "0/0"])
def test_a_part_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["cache-latents", "source", "--model", "m", "--output", "o", f"--shard={text}"])
    assert leaving.value.code == 2
    assert f"got '{text}'" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_diffusers():
    code = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from sana_sprint.cli.main import main
try:
    main(["cache-latents", "--help"])
finally:
    heavy = {{"torch", "diffusers", "transformers", "numpy", "PIL", "tqdm", "webdataset"}}
    print("imported:", heavy & {{name.split(".")[0] for name in sys.modules}} or "nothing")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("imported: nothing\n")
