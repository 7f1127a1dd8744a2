"""`sana-sprint evaluate --pictures`: pictures that are there already, judged, compared, and matched with captions."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_clip import save_tiny_clip

from sana_sprint.cli.main import main
from sana_sprint.cli.records import Picture, Record, Settings, to_chunk
from sana_sprint.evaluation.clip import ClipScorer
from sana_sprint.shapes.captions import parse
from sana_sprint.shapes.renderer import render
from sana_sprint.shapes.scenes import complete

PROMPTS = ["a red circle", "two blue stars", "a green square above a red cross", "a yellow star"]
SETTINGS = Settings(
    model="embedded",
    fingerprint="0123456789abcdef",
    steps=2,
    timesteps=None,
    guidance=4.5,
    width=64,
    height=64,
    dtype="float32",
    device="cpu",
    threads=1,
    version="0.1.0",
    torch="2.13.0",
)


@pytest.fixture
def pictures(tmp_path):
    """True pictures of four prompts as `sana-sprint generate` leaves them, but the last, which shows the first."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, prompt in enumerate(PROMPTS):
        shown = PROMPTS[0] if index == 3 else prompt
        scene = complete(parse(shown), np.random.default_rng(index))
        record = Record(settings=SETTINGS, pictures=(Picture(prompt=prompt, seed=index),), is_sheet=False)
        Image.fromarray(render(scene)).save(folder / f"{index}.png", pnginfo=to_chunk(record))
    return folder


@pytest.fixture
def evaluate(capsys):
    """Runs the command and returns the document that it printed."""

    def run(*arguments: object) -> dict:
        assert main(["evaluate", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"), most_tokens=40)


def test_pictures_of_the_shapes_world_are_judged_by_the_prompts_that_their_files_hold(pictures, evaluate):
    document = evaluate("--pictures", pictures, "--judge")
    assert document["num_pictures"] == 4
    assert document["scores"] == {"counting": 1.0, "colours": 0.5, "position": 1.0, "overall": 0.8333}


def test_captions_of_a_file_go_before_those_in_the_pictures(pictures, evaluate, tmp_path):
    captions = {"0": "a red circle", "1": "two blue stars", "2": "a red cross", "3": "a red circle"}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    document = evaluate("--pictures", pictures, "--judge", "--captions", tmp_path / "captions.json")
    assert document["scores"] == {"counting": 1.0, "colours": 0.6667, "overall": 0.8333}


def test_pictures_have_no_distance_from_themselves_and_one_from_others(pictures, evaluate, tmp_path):
    dark = tmp_path / "dark"
    dark.mkdir()
    for path in pictures.iterdir():
        Image.open(path).point(lambda value: value // 2).save(dark / path.name)
    options = ("--features", "embedded")
    same = evaluate("--pictures", pictures, "--reference", pictures, *options)["frechet"]
    other = evaluate("--pictures", pictures, "--reference", dark, *options)["frechet"]
    assert same == {"distance": 0.0, "features": "embedded", "num_references": 4, "reference": str(pictures)}
    assert other["distance"] > 1


def test_the_folder_of_an_autoencoder_serves_as_features(model_folder, pictures, evaluate):
    distance = evaluate("--pictures", pictures, "--reference", pictures, "--features", model_folder)
    assert distance["frechet"]["distance"] == 0.0


def test_folders_of_two_sizes_are_compared_as_squares_of_one(pictures, evaluate, tmp_path, capsys):
    large = tmp_path / "large"
    large.mkdir()
    for path in pictures.iterdir():
        Image.open(path).resize((128, 128)).save(large / path.name)
    arguments = ["--pictures", str(pictures), "--reference", str(large), "--features", "embedded"]
    assert main(["evaluate", *arguments]) == 2
    assert "must be of one size" in capsys.readouterr().err
    assert evaluate(*arguments, "--size", 32)["frechet"]["distance"] < 0.1


def test_the_clip_score_is_the_mean_over_pictures_and_their_prompts(pictures, clip, evaluate):
    pixels = [np.asarray(Image.open(path)) for path in sorted(pictures.iterdir())]
    expected = float(ClipScorer(clip)(pixels, PROMPTS).mean())
    assert expected > 0
    document = evaluate("--pictures", pictures, "--clip", clip)
    assert document["clip"] == {"score": pytest.approx(expected, abs=1e-3), "model": clip}


def test_all_scores_are_one_row_of_a_table(pictures, clip, capsys):
    arguments = ["--pictures", str(pictures), "--judge", "--reference", str(pictures), "--features", "embedded"]
    assert main(["evaluate", *arguments, "--clip", clip]) == 0
    header, row, *sources = capsys.readouterr().out.splitlines()
    assert header.split() == ["pictures", "counting", "colours", "position", "overall", "Fréchet", "CLIP"]
    assert row.split()[:6] == ["4", "1.000", "0.500", "1.000", "0.833", "0.0000"]
    assert sources == [f"Fréchet distance to 4 pictures in {pictures}, by embedded", f"CLIP score by {clip}"]


def test_what_is_wrong_is_one_line_that_names_it(model_folder, pictures, tmp_path, capsys):
    def error_of(*arguments: object) -> str:
        assert main(["evaluate", "--pictures", str(pictures), *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"0": "a red circle", "1": "two stars", "2": "a mouse"}))
    assert f"{captions} has no caption for 1 of 4 pictures, such as" in error_of("--judge", "--captions", captions)
    captions.write_text(json.dumps({str(index): "a mouse" for index in range(4)}))
    assert "'mouse'" in error_of("--judge", "--captions", captions)
    assert "text_encoder is no CLIP" in error_of("--clip", f"{model_folder}/text_encoder")
    assert "no folder" in error_of("--reference", tmp_path / "none")
    assert str(tmp_path / "none") in error_of("--reference", pictures, "--features", tmp_path / "none")

    sheet = Record(
        settings=SETTINGS, pictures=tuple(Picture(prompt=prompt, seed=0) for prompt in PROMPTS), is_sheet=True
    )
    Image.new("RGB", (64, 64)).save(pictures / "4.png", pnginfo=to_chunk(sheet))
    assert "4.png is a sheet" in error_of("--judge")
    Image.new("RGB", (64, 64)).save(pictures / "4.png", pnginfo=PngInfo())
    assert "4.png holds no sana_sprint text chunk" in error_of("--judge")
