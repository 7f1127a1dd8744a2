"""The table of controls, and those that need controlnet_aux."""

import sys

import numpy as np
import pytest
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


def test_what_a_network_finds_has_the_size_of_the_picture():
    hed = pytest.importorskip("controlnet_aux.hed", reason="controlnet_aux is not installed")
    detector = hed.HEDdetector(hed.ControlNetHED_Apache2())  # of random weights
    found = networks.detect(detector, Image.new("L", (100, 70), 255))
    assert (found.size, found.mode) == ((100, 70), "RGB")
