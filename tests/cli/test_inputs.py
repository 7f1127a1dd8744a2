"""Pictures that a drawing starts from: which are read, what is drawn from them, stored, and drawn again."""

import hashlib
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_sprint import SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline
from sana_sprint.cli.inputs import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH, choose_start, read_input
from sana_sprint.cli.main import main
from sana_sprint.cli.records import InputFile, read_record


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def save(name: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", seed: int = 0) -> None:
    """A picture of noise."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(levels.squeeze()).save(name)


def save_mask(name: str = "mask.png", size: tuple[int, int] = (64, 64)) -> None:
    """White on the right half."""
    levels = np.zeros((size[1], size[0]), np.uint8)
    levels[:, size[0] // 2 :] = 255
    Image.fromarray(levels).save(name)


@pytest.fixture
def start(generate):
    """`generate` in a folder with two pictures of noise, `photo.png` and `other.png`, and a `mask.png`."""
    save("photo.png")
    save("other.png", seed=1)
    save_mask()
    return generate


@pytest.mark.parametrize(
    ("default", "kind"),
    [(DEFAULT_STRENGTH, SanaSprintImg2ImgPipeline), (DEFAULT_MASKED_STRENGTH, SanaSprintInpaintPipeline)],
)
def test_the_default_strengths_are_those_of_the_pipelines(default, kind):
    assert default == inspect.signature(kind.__call__).parameters["strength"].default


@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
def test_a_picture_is_what_the_pipeline_draws_from_the_same_start(start, model_folder, masked):
    import torch

    options = ["--mask", "mask.png"] if masked else []
    code, _, err = start("a", "--init-image", "photo.png", "--strength", "0.7", "--seed", "3", *options)
    kind = SanaSprintInpaintPipeline if masked else SanaSprintImg2ImgPipeline
    pipe = kind.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    more = {"mask_image": Image.open("mask.png")} if masked else {}
    generator = torch.Generator().manual_seed(3)
    (drawn,) = pipe("a", image=Image.open("photo.png"), strength=0.7, **more, generator=generator).images
    assert (code, err) == (0, "")
    assert np.array_equal(pixels("a-3.png"), np.asarray(drawn))


def test_what_a_mask_does_not_cover_is_the_init_image_bit_for_bit(start):
    start("a", "--init-image", "photo.png", "--mask", "mask.png", "--output", "a.png")
    assert np.array_equal(pixels("a.png")[:, :32], pixels("photo.png")[:, :32])
    assert not np.array_equal(pixels("a.png")[:, 32:], pixels("photo.png")[:, 32:])


def test_a_picture_drawn_with_a_mask_has_the_size_of_the_init_image(generate):
    save("wide.png", (96, 64))
    save_mask("mask.png", (96, 64))
    generate("a", "--init-image", "wide.png", "--mask", "mask.png", "--output", "own.png")
    generate("a", "--init-image", "wide.png", "--output", "models.png")
    assert Image.open("own.png").size == (96, 64)
    assert Image.open("models.png").size == (64, 64)


def test_every_part_of_a_start_changes_the_picture(start):
    start("a", "--init-image", "photo.png", "--mask", "mask.png", "--output", "plain.png")
    Image.fromarray(255 - pixels("mask.png")).save("inverse.png")
    for option, value in [("--init-image", "other.png"), ("--mask", "inverse.png"), ("--strength", "0.3")]:
        code, _, err = start("--like", "plain.png", option, value, "--output", "changed.png")
        assert (code, err) == (0, ""), option
        assert (pixels("plain.png") != pixels("changed.png")).any(), option
        Path("changed.png").unlink()


def test_the_files_and_the_strength_are_stored_and_printed(start):
    _, out, _ = start("a", "--init-image", "photo.png", "--mask", "./mask.png", "--json")
    stored = read_record(Path("a-0.png")).settings
    photo, mask = (
        InputFile(path=name, sha256=hashlib.sha256(Path(name).read_bytes()).hexdigest())
        for name in ("photo.png", "mask.png")
    )
    assert (stored.init_image, stored.mask, stored.strength) == (photo, mask, DEFAULT_MASKED_STRENGTH)
    assert json.loads(out)["init_image"] == {"path": photo.path, "sha256": photo.sha256}


@pytest.mark.parametrize(
    "options",
    [
        ["--init-image", "photo.png"],
        ["--init-image", "photo.png", "--strength", "0.25", "--steps", "4", "--size", "96x64"],
        ["--init-image", "photo.png", "--mask", "mask.png"],
        ["--init-image", "photo.png", "--grid", "--num-images", "2"],
    ],
    ids=" ".join,
)
def test_like_draws_from_the_same_start_bit_for_bit(start, options):
    start("a", "--output", "first.png", *options)
    code, out, err = start("--like", "first.png", "--output", "again.png")
    assert (code, out, err) == (0, "wrote again.png\n", "")
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


@pytest.mark.parametrize("changed", ["photo.png", "mask.png"])
def test_like_tells_in_one_line_which_file_has_changed(start, changed):
    start("a", "--init-image", "photo.png", "--mask", "mask.png")
    before = hashlib.sha256(Path(changed).read_bytes()).hexdigest()
    image = Image.open(changed)
    image.putpixel((40, 9), 7 if image.mode == "L" else (7, 7, 7))
    image.save(changed)
    after = hashlib.sha256(Path(changed).read_bytes()).hexdigest()
    code, out, err = start("--like", "a-0.png")
    assert (code, out) == (0, "wrote a-0-2.png\n")
    assert err == (
        f"sana-sprint: warning: a-0.png was drawn with {changed} of SHA-256 {before[:16]} (here {after[:16]}):"
        " the picture may differ\n"
    )


def test_like_finds_a_file_that_was_moved_where_it_is_told_to(start):
    start("a", "--init-image", "photo.png", "--output", "first.png")
    os.rename("photo.png", "moved.png")
    code, out, err = start("--like", "first.png")
    assert (code, out) == (2, "")
    assert err == "sana-sprint: error: photo.png is not there any more: --init-image says where it is now\n"
    code, _, err = start("--like", "first.png", "--init-image", "moved.png", "--output", "again.png")
    assert (code, err) == (0, "")
    assert np.array_equal(pixels("first.png"), pixels("again.png"))


def test_a_picture_is_read_as_the_camera_was_held(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # Orientation: to be turned clockwise by a quarter
    Image.fromarray(levels).save(tmp_path / "photo.png", exif=rotated)
    assert np.array_equal(np.asarray(read_input(tmp_path / "photo.png").image), np.rot90(levels, -1))


def test_nothing_to_start_from_is_noise_alone():
    assert choose_start(None, None, None, None) is None


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs `generate` with a model that is not there, so that what is refused is refused before it is looked for."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(["generate", "a", "--model", "not-there", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err.removeprefix("sana-sprint: error: ").strip()

    return run


def test_a_start_that_cannot_be_is_one_line_before_a_model_is_looked_for(refused):
    save("photo.png")
    save_mask("narrow.png", (32, 64))
    save("colours.png", mode="RGBA")
    Image.new("I;16", (64, 64)).save("deep.png")
    Path("text.png").write_text("a red circle")
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:-2000])
    noise_alone = "needs --init-image: without one, pictures are drawn from noise alone"
    assert refused("--mask", "narrow.png") == f"--mask {noise_alone}"
    assert refused("--strength", "0") == f"--strength {noise_alone}"
    assert refused("--init-image", "none.png") == "none.png: No such file or directory"
    assert refused("--init-image", ".") == ".: Is a directory"
    assert refused("--init-image", "text.png") == "text.png is no picture"
    assert refused("--init-image", "broken.png").startswith("broken.png is no whole picture: ")
    assert refused("--init-image", "deep.png").startswith("deep.png: image must have 8 bits for each colour, got ")
    assert refused("--init-image", "photo.png", "--mask", "text.png") == "text.png is no picture"
    assert refused("--init-image", "photo.png", "--mask", "colours.png").startswith(
        "colours.png: mask_image must have no transparency"
    )
    assert refused("--init-image", "photo.png", "--mask", "narrow.png") == (
        "narrow.png must have the size of photo.png, 64x64, got 32x64"
    )
    assert refused("--init-image", "photo.png").startswith("no folder not-there")


def test_a_stored_start_may_be_given_a_mask_and_keeps_its_strength(start):
    start("a", "--init-image", "photo.png", "--strength", "0.5", "--output", "first.png")
    start("--like", "first.png", "--mask", "mask.png", "--output", "masked.png")
    settings = read_record(Path("masked.png")).settings
    assert (settings.init_image.path, settings.mask.path, settings.strength) == ("photo.png", "mask.png", 0.5)
    assert np.array_equal(pixels("masked.png")[:, :32], pixels("photo.png")[:, :32])


def test_quantised_networks_draw_from_a_start_too(generate):
    """The pipeline that fits is a SanaSprintPipeline; the one that starts from a picture shares its networks."""
    save("photo.png")
    options = ("a red circle on white", "--model", "embedded", "--quantization", "8bit", "--steps", "1")
    assert generate(*options, "--init-image", "photo.png", "--output", "a.png")[0] == 0
    assert generate(*options, "--output", "noise.png")[0] == 0
    assert (pixels("a.png") != pixels("noise.png")).any()
