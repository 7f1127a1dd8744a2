"""The text chunk of a PNG holds what made it, and gives it back exactly."""

import json
import math
from dataclasses import asdict, replace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_sprint.cli.records import CHUNK, InputFile, Picture, Record, Settings, read_record, to_chunk

SETTINGS = Settings(
    model="embedded",
    fingerprint="0123456789abcdef",
    steps=None,
    timesteps=(math.pi / 2, 1.3, 0.0),
    guidance=4.1,
    width=64,
    height=96,
    dtype="float32",
    device="cpu",
    threads=2,
    version="0.1.0",
    torch="2.13.0",
    quantization="8bit",
    memory=10**9,
    init_image=InputFile(path="photos/grün.jpg", sha256="ab" * 32),
    mask=InputFile(path="mask.png", sha256="cd" * 32),
    strength=0.8,
    control_image=InputFile(path="../sketch.png", sha256="ef" * 32),
    control="soft_edges",
    controlnet="owner/name",
    controlnet_fingerprint="fedcba9876543210",
    control_scale=-0.5,
)
# Not in the first pictures' chunks.
GUIDED = ("control_image", "control", "controlnet", "controlnet_fingerprint", "control_scale")
LATER = ("quantization", "memory", "init_image", "mask", "strength", *GUIDED)
ONE = (Picture(prompt='ein "grüner" Stern\n红', seed=2**63 - 1),)
MANY = (*ONE, Picture(prompt="", seed=0))


def save(path, chunk: PngInfo):
    Image.new("RGB", (2, 2)).save(path, pnginfo=chunk)
    return path


@pytest.mark.parametrize(("pictures", "is_sheet"), [(ONE, False), (ONE, True), (MANY, True)])
def test_a_record_comes_back_from_its_png_as_it_was(pictures, is_sheet, tmp_path):
    record = Record(settings=SETTINGS, pictures=pictures, is_sheet=is_sheet)
    assert read_record(save(tmp_path / "a.png", to_chunk(record))) == record


@pytest.mark.parametrize("later", [GUIDED, LATER], ids=["without ControlNets", "the first"])
def test_a_picture_from_before_there_was_a_setting_was_drawn_without_it(later, tmp_path):
    values = {**asdict(SETTINGS), **asdict(ONE[0])}
    for name in later:
        del values[name]
    text = PngInfo()
    text.add_text(CHUNK, json.dumps(values))
    settings = read_record(save(tmp_path / "a.png", text)).settings
    assert settings == replace(SETTINGS, **dict.fromkeys(later))


def test_the_chunk_is_json_with_prompt_seed_steps_model_and_version(tmp_path):
    path = save(tmp_path / "a.png", to_chunk(Record(settings=SETTINGS, pictures=ONE, is_sheet=False)))
    stored = json.loads(Image.open(path).info[CHUNK])
    assert stored["prompt"] == ONE[0].prompt
    assert stored["seed"] == ONE[0].seed
    assert {"steps", "timesteps", "model", "version"} <= stored.keys()


def test_a_png_of_another_program_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png holds no sana_sprint text chunk"):
        read_record(save(tmp_path / "a.png", PngInfo()))


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_text("a red circle")
    with pytest.raises(ValueError, match=r"a\.png is no picture"):
        read_record(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        '{"prompt": "a", "seed": 1}',
        '{"pictures": []}',
        json.dumps({**asdict(SETTINGS), **asdict(ONE[0]), "init_image": {"path": "photo.jpg"}}),
        json.dumps({**asdict(SETTINGS), **asdict(ONE[0]), "control_image": "sketch.png"}),
    ],
)
def test_a_chunk_that_was_tampered_with_is_refused(text, tmp_path):
    chunk = PngInfo()
    chunk.add_text(CHUNK, text)
    with pytest.raises(ValueError, match="cannot be understood"):
        read_record(save(tmp_path / "a.png", chunk))


def test_a_picture_that_breaks_off_is_refused(tmp_path):
    path = save(tmp_path / "a.png", to_chunk(Record(settings=SETTINGS, pictures=ONE, is_sheet=False)))
    whole = path.read_bytes()
    path.write_bytes(whole[: -len(whole) // 3])
    with pytest.raises(ValueError, match=r"a\.png is no (whole )?picture"):
        read_record(path)
