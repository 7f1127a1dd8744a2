"""The table of controls, and those that need controlnet_aux."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint.conditioning import networks
from sana_sprint.conditioning.table import CONTROLS, control_named

DRAWN_HERE = ("edges", "scribble", "soft_edges")


def test_controls_are_known_by_name_and_others_refused_with_those_there_are():
    assert {name: control_named(name) for name in CONTROLS} == CONTROLS
    with pytest.raises(
        ValueError, match="no control is named 'canny'; there are edges, scribble, soft_edges, depth, hed"
    ):
        control_named("canny")


def test_networks_run_on_the_device_that_is_said_and_what_runs_none_does_not_ask():
    assert {name: control_named(name, "meta") for name in DRAWN_HERE} == {name: CONTROLS[name] for name in DRAWN_HERE}
    for name in CONTROLS.keys() - set(DRAWN_HERE):
        assert control_named(name, "meta").keywords == {"device": "meta"}


@pytest.mark.parametrize("name", DRAWN_HERE)
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 64), (333, 130)], ids=str)
def test_a_control_has_the_size_of_its_picture(name, size):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    before = pixels.copy()
    found = control_named(name)(pixels)
    assert (found.size, found.mode) == (size, "RGB")
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("name", ["depth", "hed"])
def test_without_controlnet_aux_the_error_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)  # what import then takes for missing
    networks._detector.cache_clear()
    with pytest.raises(ImportError, match=r"need controlnet_aux: pip install 'sana-sprint\[control\]'"):
        control_named(name)(Image.new("RGB", (8, 8)))


@pytest.fixture
def random_networks(tmp_path, monkeypatch):
    """A folder of weights as on the hub, at random, in the place of those."""
    hed = pytest.importorskip("controlnet_aux.hed", reason="controlnet_aux is not installed")
    midas = pytest.importorskip("controlnet_aux.midas.midas.dpt_depth")
    torch.save(hed.ControlNetHED_Apache2().state_dict(), tmp_path / "ControlNetHED.pth")
    depth = midas.DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)
    torch.save(depth.state_dict(), tmp_path / "dpt_hybrid-midas-501f0c75.pt")
    monkeypatch.setattr(networks, "WEIGHTS", str(tmp_path))
    networks._detector.cache_clear()
    yield
    networks._detector.cache_clear()


@pytest.mark.parametrize("name", ["depth", "hed"])
def test_what_a_network_finds_has_the_size_of_the_picture_and_comes_without_a_word(
    name, random_networks, recwarn, capfd
):
    picture = Image.linear_gradient("L")
    for size in ((100, 70), (64, 64), (700, 900)):
        found = control_named(name)(picture.resize(size))
        assert (found.size, found.mode) == (size, "RGB")
    # Random weights may find no depth at all, and MiDaS divides by how much it differs: a RuntimeWarning.
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning | FutureWarning)]
    assert capfd.readouterr() == ("", "")
