"""What tells networks and data apart, and tensors that are made again where they were made from something else."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sana_sprint.training.identity import data_sources, made_once, network_digest, tensors_digest

TENSORS = {"a": torch.arange(600.0).reshape(20, 30), "b": torch.tensor(3.0)}


@pytest.mark.parametrize(
    "other",
    [
        {"a": TENSORS["a"] + 1, "b": TENSORS["b"]},
        {"a": TENSORS["a"], "b": torch.tensor(4.0)},
        {"a": TENSORS["a"].reshape(30, 20), "b": TENSORS["b"]},
        {"c": TENSORS["a"], "b": TENSORS["b"]},
        {"a": TENSORS["a"]},
    ],
)
def test_a_digest_changes_with_numbers_shapes_and_names(other):
    assert tensors_digest(other) != tensors_digest(TENSORS)


def test_a_digest_does_not_depend_on_the_dtype_that_holds_the_numbers():
    whole = {name: tensor.round().clamp(max=128) for name, tensor in TENSORS.items()}
    assert tensors_digest({name: tensor.bfloat16() for name, tensor in whole.items()}) == tensors_digest(whole)


def test_networks_of_other_weights_differ_and_copies_do_not():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    assert network_digest(first) != network_digest(second)
    second.load_state_dict(first.state_dict())
    assert network_digest(first) == network_digest(second)


def test_data_are_told_apart_by_the_settings_named_and_by_networks():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    recipe = SimpleNamespace(size=64, seed=1)
    found = data_sources(recipe, ["size"], encoder=first)
    assert found == {"size": 64, "encoder": network_digest(first)}
    assert data_sources(SimpleNamespace(size=64, seed=2), ["size"], encoder=first) == found
    assert data_sources(recipe, ["size"], encoder=second) != found
    assert data_sources(SimpleNamespace(size=32, seed=1), ["size"], encoder=first) != found


def test_tensors_are_made_once_and_again_from_something_else(tmp_path):
    made = []

    def make():
        made.append(torch.full((2,), float(len(made))))
        return {"numbers": made[-1]}

    path = tmp_path / "below" / "data.pt"
    found = [
        made_once(path, made_from, make)["numbers"].tolist() for made_from in ({"seed": 1}, {"seed": 1}, {"seed": 2})
    ]
    assert found == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert made_once(path, {"seed": 2}, make)["numbers"].tolist() == [1.0, 1.0]


def test_a_file_that_says_nothing_of_what_it_was_made_from_is_made_again(tmp_path):
    torch.save((torch.zeros(2),), tmp_path / "data.pt")
    assert made_once(tmp_path / "data.pt", {}, lambda: {"numbers": torch.ones(1)})["numbers"].tolist() == [1.0]
