"""Training in processes of their own: one that is killed, and two that share every step."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_training
import torch

SCRIPT = Path(tiny_training.__file__)
ROOT = SCRIPT.parents[2]


def start(*arguments, **environment):
    """A Python process that runs the script of tests/support."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state_of(path):
    return torch.load(path, weights_only=True)


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start("slowly", killed)
    try:
        wait_for(lambda: killed.is_dir() and any(killed.glob("state-*.pt")), process)
        time.sleep(random.uniform(0, 1.5))
    finally:
        process.kill()
    process.communicate()
    last = tiny_training.LONG_LOOP.steps
    assert not (killed / f"state-{last:06d}.pt").exists()
    average = tiny_training.run(killed, tiny_training.LONG_LOOP).state_dict()
    uninterrupted = tiny_training.run(whole, tiny_training.LONG_LOOP).state_dict()
    assert all(torch.equal(average[name], weight) for name, weight in uninterrupted.items())
    networks = [state_of(folder / f"state-{last:06d}.pt")["network"] for folder in (killed, whole)]
    assert all(torch.equal(networks[0][name], weight) for name, weight in networks[1].items())
    assert [entry["step"] for entry in log_of(killed)] == list(range(1, last + 1))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have run all that the script has for several."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start("as-one-of-several", folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    # Nothing on the screen: no bar where no terminal is, and no warnings of the libraries.
    assert said == ["", ""]
    return folder


def assert_same_losses(folder, path, names):
    """In float32 and another order of sums, which six updates carry on."""
    ours, theirs = ([[entry[name] for name in names] for entry in log_of(each)] for each in (folder, path))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert len(ours) == tiny_training.LOOP.steps


def test_two_processes_make_the_steps_of_one(two_processes, tmp_path):
    tiny_training.run(tmp_path)
    assert_same_losses(two_processes / "ddp", tmp_path, ("loss", "transformer_gradient_norm"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_distil_as_one(two_processes, tmp_path, kind):
    tiny_training.distil(tmp_path)
    assert_same_losses(two_processes / f"distilled-{kind}", tmp_path, ("consistency", "adversarial", "discriminator"))


def test_sharded_processes_make_the_steps_of_one(two_processes, tmp_path):
    tiny_training.run(tmp_path, use_muon=False)
    assert_same_losses(two_processes / "fsdp", tmp_path, ("loss", "transformer_gradient_norm"))
    averages = [state_of(two_processes / f"average-{rank}.pt") for rank in (0, 1)]
    saved = state_of(tmp_path / "state-000006.pt")["average"]
    for average in averages:
        torch.testing.assert_close(average, saved, rtol=1e-3, atol=1e-4)


def test_a_sharded_run_goes_on_to_the_same_weights_and_its_state_is_whole(two_processes, tmp_path):
    uninterrupted, resumed = (state_of(two_processes / name) for name in ("whole.pt", "fsdp/state-000006.pt"))
    for part in ("network", "average"):
        assert all(torch.equal(resumed[part][name], value) for name, value in uninterrupted[part].items())
    for group in ("transformer", "outside"):
        moments, others = (state["optimisers"][group]["adamw"]["state"] for state in (uninterrupted, resumed))
        assert all(torch.equal(others[i][name], value) for i in moments for name, value in moments[i].items())
    tiny_training.run(tmp_path, use_muon=False)
    one_process = state_of(tmp_path / "state-000006.pt")["network"]
    assert {name: value.shape for name, value in resumed["network"].items()} == {
        name: value.shape for name, value in one_process.items()
    }


def test_what_processes_cannot_share_is_refused_before_any_work(two_processes):
    for rank in (0, 1):
        assert json.loads((two_processes / f"messages-{rank}.json").read_text()) == {
            "other device": "the processes were launched on cpu, and the device asked for is cuda",
            "FSDP kept whole": [],
            "odd batch": "batch_size must be a multiple of processes × micro-steps, 2 × 1, got 9",
            "Muon": "Muon needs whole matrices, and FSDP shards those of group 'transformer': launch with DDP",
            "8 bits": "AdamW in 8 bits cannot be sharded: choose kind='adamw' for group 'transformer'",
            "FSDP 1": "FSDP 1 is not supported: launch with fsdp_version 2",
        }
    assert not any((two_processes / "refused").iterdir())
