"""The machine's description and its measured peak."""

import pytest
import torch

from sana_sprint.bench import machine

CPU = torch.device("cpu")


def test_a_description_says_what_numbers_depend_on():
    found = machine.describe(CPU)
    assert found["name"]
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert {"device", "sana_sprint", "diffusers", "transformers", "bitsandbytes", "python", "system"} <= found.keys()


def test_the_processor_is_what_the_system_calls_it(monkeypatch, tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Fast One 3000\nmodel name\t: Fast One 3000\n")
    monkeypatch.setattr(machine, "_PROCESSORS", listing)
    assert machine.processor_name() == "Fast One 3000"


def test_without_such_a_list_the_architecture_stands_for_the_name(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_PROCESSORS", tmp_path / "missing")
    assert machine.processor_name()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_is_a_speed_that_a_machine_can_have(dtype):
    # From a slow core's to beyond any accelerator's: a wrong unit would be out by a thousand.
    assert 1e8 < machine.peak_speed(dtype, CPU, is_quick=True) < 1e17
