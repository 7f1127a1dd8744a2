"""Drawings that a ControlNet follows: which are read, what is drawn after them, stored, shown, and drawn again."""

import inspect
import json
import os
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from control_calls import ring
from PIL import Image
from tiny_control import open_control

from sana_sprint import (
    AutoencoderDC,
    SanaControlNetModel,
    SanaSprintControlNetImg2ImgPipeline,
    SanaSprintControlNetPipeline,
    SanaTransformer2DModel,
    embedded_checkpoint,
)
from sana_sprint.cli.arguments import CONTROLS, NO_CONTROL
from sana_sprint.cli.control import DEFAULT_CONTROL, DEFAULT_SCALE, Guide, find_controlnet
from sana_sprint.cli.inputs import read_input
from sana_sprint.cli.main import main
from sana_sprint.cli.model import Fitting, Model, find_model, load, seen_size
from sana_sprint.cli.records import InputFile, read_record
from sana_sprint.conditioning.table import CONTROLS as TABLE


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def save_noise(name: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", seed: int = 0) -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(levels).save(name)


@pytest.fixture
def follow(generate, control_folder):
    """`generate` in a folder with a `ring.png`, and the same with the tiny ControlNet, which is shown it as it is."""
    ring().save("ring.png")

    def run(*arguments: str) -> tuple[int, str, str]:
        return generate(*arguments, "--control-image", "ring.png", "--control", "none", "--controlnet", control_folder)

    return run


@pytest.fixture
def edges():
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    from sana_sprint.conditioning.edges import edges

    return edges


def test_the_controls_are_those_that_there_are_and_none():
    assert tuple(TABLE) == CONTROLS
    assert NO_CONTROL not in CONTROLS
    assert DEFAULT_CONTROL in CONTROLS


@pytest.mark.parametrize("kind", [SanaSprintControlNetPipeline, SanaSprintControlNetImg2ImgPipeline])
def test_the_default_scale_is_that_of_the_pipelines(kind):
    assert inspect.signature(kind.__call__).parameters["controlnet_conditioning_scale"].default == DEFAULT_SCALE


@pytest.mark.parametrize("started", [False, True], ids=["from noise", "from a picture"])
def test_a_picture_is_what_the_pipeline_draws_after_the_same_drawing(follow, model_folder, control_folder, started):
    save_noise("photo.png")
    options = ["--init-image", "photo.png", "--strength", "0.7"] if started else []
    code, _, err = follow("a", "--control-scale", "0.5", "--seed", "3", *options)
    kind = SanaSprintControlNetImg2ImgPipeline if started else SanaSprintControlNetPipeline
    pipe = kind.from_pretrained(model_folder, controlnet=SanaControlNetModel.from_pretrained(control_folder))
    pipe.set_progress_bar_config(disable=True)
    more = {"image": Image.open("photo.png"), "strength": 0.7} if started else {}
    generator = torch.Generator().manual_seed(3)
    (drawn,) = pipe("a", control_image=ring(), controlnet_conditioning_scale=0.5, **more, generator=generator).images
    assert (code, err) == (0, "")
    assert np.array_equal(pixels("a-3.png"), np.asarray(drawn))


def test_a_drawing_that_does_not_count_leaves_the_picture_as_it_is_without(follow, generate):
    follow("a", "--control-scale", "0", "--output", "none.png")
    generate("a", "--output", "plain.png")
    follow("a", "--output", "followed.png")
    assert np.array_equal(pixels("none.png"), pixels("plain.png"))
    assert (pixels("followed.png") != pixels("plain.png")).any()


def test_edges_are_found_by_default(generate, follow, control_folder, edges):
    save_noise("photo.png")
    edges(Image.open("photo.png")).save("ring.png")  # what `follow` shows as it is
    follow("a", "--output", "drawing.png")
    generate("a", "--control-image", "photo.png", "--controlnet", control_folder, "--output", "found.png")
    assert np.array_equal(pixels("drawing.png"), pixels("found.png"))
    assert read_record(Path("found.png")).settings.control == "edges"


def test_every_option_of_the_drawing_changes_the_picture(follow, tiny_pipeline_parts, edges):
    open_control(tiny_pipeline_parts["transformer"], seed=5).save_pretrained("other")
    save_noise("photo.png")
    follow("a", "--output", "plain.png")
    for option, value in [
        ("--control-image", "photo.png"),
        ("--control", "edges"),
        ("--controlnet", "other"),
        ("--control-scale", "-0.5"),
    ]:
        assert main(["generate", "--like", "plain.png", option, value, "--output", "changed.png"]) == 0, option
        assert (pixels("plain.png") != pixels("changed.png")).any(), option
        Path("changed.png").unlink()


def test_what_was_followed_is_stored_and_printed(follow, control_folder):
    _, out, _ = follow("a", "--control-scale", "0.8", "--json")
    stored = read_record(Path("a-0.png")).settings
    file = InputFile(path="ring.png", sha256=sha256(Path("ring.png").read_bytes()).hexdigest())
    assert (stored.control_image, stored.control, stored.control_scale) == (file, "none", 0.8)
    assert stored.controlnet == control_folder
    assert stored.controlnet_fingerprint == find_controlnet(control_folder).fingerprint
    printed = json.loads(out)
    assert (printed["control_image"]["path"], printed["controlnet"]) == ("ring.png", control_folder)
    assert "control_preview" not in printed


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--control-scale", "0.7", "--steps", "4", "--size", "96x64"],
        ["--init-image", "photo.png", "--strength", "0.4"],
        ["--grid", "--num-images", "2"],
    ],
    ids=" ".join,
)
def test_like_follows_the_same_drawing_bit_for_bit(follow, generate, options):
    save_noise("photo.png")
    follow("a", "--output", "first.png", *options)
    code, out, err = generate("--like", "first.png", "--output", "again.png")
    assert (code, out, err) == (0, "wrote again.png\n", "")
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


def test_like_finds_in_a_picture_what_was_found_in_it(generate, control_folder, edges):
    save_noise("photo.png", (200, 100))
    generate("a", "--control-image", "photo.png", "--controlnet", control_folder, "--output", "first.png")
    assert generate("--like", "first.png", "--output", "again.png") == (0, "wrote again.png\n", "")
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


def test_a_picture_without_a_drawing_may_be_given_one(generate, control_folder):
    ring().save("ring.png")
    generate("a", "--output", "plain.png")
    options = ("--control-image", "ring.png", "--control", "none", "--controlnet", control_folder)
    generate("a", *options, "--output", "followed.png")
    code, _, err = generate("--like", "plain.png", *options, "--output", "later.png")
    assert (code, err) == (0, "")
    assert Path("later.png").read_bytes() == Path("followed.png").read_bytes()


def test_like_tells_in_one_line_when_the_drawing_and_the_controlnet_have_changed(
    generate, follow, control_folder, tiny_pipeline_parts
):
    follow("a")
    before = [sha256(Path("ring.png").read_bytes()).hexdigest()[:16], find_controlnet(control_folder).fingerprint]
    save_noise("ring.png")
    open_control(tiny_pipeline_parts["transformer"], seed=5).save_pretrained("other")
    after = [sha256(Path("ring.png").read_bytes()).hexdigest()[:16], find_controlnet("other").fingerprint]
    code, out, err = generate("--like", "a-0.png", "--controlnet", "other")
    assert (code, out) == (0, "wrote a-0-2.png\n")
    assert err == (
        f"sana-sprint: warning: a-0.png was drawn with ControlNet files {before[1]} (here {after[1]}),"
        f" ring.png of SHA-256 {before[0]} (here {after[0]}): the picture may differ\n"
    )


def test_like_asks_for_a_drawing_that_is_gone(generate, follow):
    follow("a")
    os.remove("ring.png")
    error = "sana-sprint: error: ring.png is not there any more: --control-image says where it is now\n"
    assert generate("--like", "a-0.png") == (2, "", error)


def test_lines_are_found_as_large_as_they_are_drawn(tmp_path, edges):
    save_noise(tmp_path / "photo.png", (200, 100))
    photo = read_input(tmp_path / "photo.png")
    shown = Guide(image=photo, control="edges", controlnet="", scale=1.0).drawing((96, 64))
    assert np.array_equal(shown, edges(photo.image.resize((96, 64), Image.Resampling.LANCZOS)))


def test_lines_are_found_in_the_size_that_is_drawn_and_not_in_the_one_asked_for(tmp_path, model_folder):
    for name in ("transformer", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
        shutil.copy(Path(model_folder) / name / "config.json", tmp_path / name)
    config = tmp_path / "transformer" / "config.json"
    vae = AutoencoderDC.load_config(tmp_path / "vae")
    ratio = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 1024 // ratio}))
    model = Model(name="of 1024 pixels", folder=tmp_path, fingerprint="")
    assert seen_size(model) == seen_size(model, (512, 512)) == (1024, 1024)
    assert seen_size(model, (1024, 768)) == (1109, 832)  # of 1216x832
    assert seen_size(replace(model, folder=Path(model_folder)), (96, 64)) == (96, 64)


def test_a_pipelines_own_controlnet_is_found_beside_it(generate, model_folder, control_folder, tmp_path):
    ring().save("ring.png")
    shutil.copytree(model_folder, "both")
    shutil.copytree(control_folder, "both/controlnet")
    options = ("a", "--control-image", "ring.png", "--control", "none")
    assert generate(*options, "--model", "both")[0] == 0
    assert generate(*options, "--model", model_folder, "--controlnet", control_folder)[0] == 0
    assert np.array_equal(pixels("a-0.png"), pixels("a-0-2.png"))


def test_a_preview_is_what_the_controlnet_is_shown_and_overwrites_nothing(generate, control_folder, edges):
    save_noise("photo.png")
    options = ("--control-image", "photo.png", "--controlnet", control_folder, "--control-preview", "seen/edges.png")
    code, out, err = generate("a", "b", *options)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"wrote {name}" for name in (os.path.join("seen", "edges.png"), "a-0.png", "b-0.png")]
    assert np.array_equal(pixels("seen/edges.png"), np.asarray(edges(Image.open("photo.png"))))
    before = Path("seen/edges.png").read_bytes()
    _, out, _ = generate("a", *options, "--size", "96x64", "--grid", "--json")
    assert json.loads(out)["control_preview"] == os.path.join("seen", "edges-2.png")
    assert Image.open("seen/edges-2.png").size == (96, 64)
    assert Path("seen/edges.png").read_bytes() == before


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs `generate` with a model that is not there, so that what is refused is refused before it is looked for."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, prompt: tuple[str, ...] = ("a", "--model", "not-there")) -> str:
        assert main(["generate", *prompt, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err.removeprefix("sana-sprint: error: ").strip()

    return run


def test_a_drawing_that_cannot_be_is_one_line_before_a_model_is_looked_for(refused, control_folder):
    ring().save("ring.png")
    save_noise("clear.png", mode="RGBA")
    Image.new("I;16", (64, 64)).save("deep.png")
    Path("text.png").write_text("a red circle")
    nothing = "needs --control-image: without one, there is nothing to"
    assert refused("--control", "edges") == f"--control {nothing} follow"
    assert refused("--controlnet", control_folder) == f"--controlnet {nothing} follow"
    assert refused("--control-scale", "1") == f"--control-scale {nothing} follow"
    assert refused("--control-preview", "seen.png") == f"--control-preview {nothing} show"
    given = ("--controlnet", control_folder, "--control", "none", "--control-image")
    assert refused(*given, "none.png") == "none.png: No such file or directory"
    assert refused(*given, "text.png") == "text.png is no picture"
    assert refused(*given, "deep.png").startswith("deep.png: a picture must have 8 bits per channel")
    assert refused(*given, "clear.png").startswith("clear.png: the picture is transparent in places")
    assert refused(*given, "ring.png", "--init-image", "ring.png", "--mask", "ring.png") == (
        "--control-image and --mask exclude each other: there is no inpainting after a drawing"
    )
    assert refused(*given, "ring.png", "--control-preview", "seen.jpg") == (
        "--control-preview must be a file ending in .png, got seen.jpg"
    )
    assert refused("--control-image", "ring.png") == (
        "--control-image needs --controlnet, a folder or a hub id: there is none for not-there"
    )
    assert refused(*given, "ring.png").startswith("no folder not-there")


def test_a_mask_that_is_stored_excludes_a_drawing_too(generate, refused, control_folder):
    ring().save("ring.png")
    generate("a", "--init-image", "ring.png", "--mask", "ring.png", "--output", "masked.png")
    given = ("--like", "masked.png", "--control-image", "ring.png", "--control", "none", "--controlnet", control_folder)
    assert refused(*given, prompt=()).startswith("--control-image and --mask exclude each other")


@pytest.mark.parametrize(
    ("control", "package", "message"),
    [
        ("edges", "cv2", "finding lines in pictures needs OpenCV: pip install 'sana-sprint[control]'"),
        ("scribble", "cv2", "finding lines in pictures needs OpenCV: pip install 'sana-sprint[control]'"),
        ("depth", "controlnet_aux", "depth and hed need controlnet_aux: pip install 'sana-sprint[control]'"),
        ("hed", "controlnet_aux", "depth and hed need controlnet_aux: pip install 'sana-sprint[control]'"),
    ],
)
def test_a_package_that_is_missing_is_named_before_a_model_is_looked_for(
    refused, monkeypatch, control_folder, control, package, message
):
    monkeypatch.setitem(sys.modules, package, None)
    ring().save("ring.png")
    assert refused("--control-image", "ring.png", "--control", control, "--controlnet", control_folder) == message


def test_a_controlnet_for_another_model_is_one_line(generate, follow, tiny_pipeline_parts):
    transformer = SanaTransformer2DModel.from_config(tiny_pipeline_parts["transformer"].config, caption_channels=16)
    SanaControlNetModel.from_transformer(transformer, num_layers=1).save_pretrained("other")
    options = ("--control-image", "ring.png", "--control", "none", "--controlnet", "other")
    assert generate("a", *options) == (
        2,
        "",
        "sana-sprint: error: controlnet must have the transformer's caption_channels=32, got 16\n",
    )


def test_a_folder_that_holds_no_controlnet_is_refused_by_name(tmp_path, model_folder, control_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder ./missing; --controlnet takes"):
        find_controlnet("./missing")
    with pytest.raises(ValueError, match=r"is no folder of a ControlNet: it holds no config\.json"):
        find_controlnet(model_folder)
    with pytest.raises(ValueError, match="holds a SanaTransformer2DModel, and --controlnet takes a SanaControlNet"):
        find_controlnet(str(Path(model_folder) / "transformer"))
    shutil.copytree(control_folder, "broken")
    Path("broken/config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the config of a network"):
        find_controlnet("broken")


def test_damaged_weights_of_a_controlnet_are_one_line(generate, follow, control_folder):
    shutil.copytree(control_folder, "damaged")
    Path("damaged/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    code, out, err = generate("a", "--control-image", "ring.png", "--control", "none", "--controlnet", "damaged")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_fingerprint_of_a_controlnet_changes_with_its_weights_and_not_with_its_place(tmp_path, control_folder):
    moved = shutil.copytree(control_folder, tmp_path / "moved")
    (moved / "README.md").write_text("about")
    assert find_controlnet(str(moved)).fingerprint == find_controlnet(control_folder).fingerprint
    with (moved / "diffusion_pytorch_model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"x")
    assert find_controlnet(str(moved)).fingerprint != find_controlnet(control_folder).fingerprint


def test_a_controlnet_of_the_hub_is_found_where_it_was_fetched_to(tmp_path, control_folder, monkeypatch):
    repository = tmp_path / "models--owner--name"
    shutil.copytree(control_folder, repository / "snapshots" / ("ab" * 20))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_controlnet("owner/name")
    assert (found.name, found.fingerprint) == ("owner/name", find_controlnet(control_folder).fingerprint)
    with pytest.raises(OSError, match="there is no folder owner/other, and the hub gave no such ControlNet"):
        find_controlnet("owner/other")


@pytest.fixture
def shapes_control(tmp_path, monkeypatch, edges) -> Path:
    """A ControlNet for the embedded checkpoint in the place of the embedded one, with its ways open."""
    transformer = SanaTransformer2DModel.from_pretrained(embedded_checkpoint() / "transformer")
    open_control(transformer).save_pretrained(tmp_path / "shapes-control")
    monkeypatch.setattr("sana_sprint.assets._CONTROL_FOLDER", tmp_path / "shapes-control")
    return tmp_path / "shapes-control"


def test_the_embedded_model_is_followed_by_the_embedded_controlnet(generate, shapes_control):
    ring().save("ring.png")
    options = ("a red circle on white", "--model", "embedded", "--steps", "1", "--quantization", "8bit")
    assert generate(*options, "--output", "plain.png")[0] == 0
    code, _, err = generate(*options, "--control-image", "ring.png", "--output", "followed.png")
    assert (code, err) == (0, "")
    assert (pixels("plain.png") != pixels("followed.png")).any()
    assert read_record(Path("followed.png")).settings.controlnet == "embedded"


def test_the_memory_for_a_model_is_for_its_controlnet_too(shapes_control):
    model, fitting = find_model("embedded"), Fitting(memory=2 * 10**9)
    placed = (torch.device("cpu"), torch.float32, fitting, False)
    free = load(model, *placed)
    followed = load(model, *placed, SanaSprintControlNetPipeline, find_controlnet("embedded"))
    weights = sum(parameter.numel() for parameter in followed.controlnet.parameters())
    assert followed.memory_plan.peak - free.memory_plan.peak >= weights  # a byte each, where all is in 8 bits


def test_without_the_embedded_controlnet_one_line_says_what_to_do(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("sana_sprint.assets._CONTROL_FOLDER", tmp_path)
    ring().save("ring.png")
    error = refused("--control-image", "ring.png", "--control", "none", prompt=("a red circle",))
    assert error.startswith("the embedded ControlNet is missing: ")
    assert error.endswith("train it with: sana-sprint train shapes_control")
