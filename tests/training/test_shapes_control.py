"""All stages of the shapes world's ControlNet, run end to end with few steps on the embedded checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sana_sprint import AutoencoderDC, SanaControlNetModel
from sana_sprint.assets import embedded_checkpoint
from sana_sprint.conditioning.edges import edges
from sana_sprint.shapes.captions import are_words_held_out, is_held_out, parse
from sana_sprint.training.autoencoder import encode_pictures
from sana_sprint.training.data import picture_pool
from sana_sprint.training.origin import Origin
from sana_sprint.training.recipes import shapes
from sana_sprint.training.recipes.shapes_control import RECIPE, shortened
from sana_sprint.training.rehearsal import rehearse
from sana_sprint.training.shapes_control import ShapesControlTraining
from sana_sprint.transformer.model import SanaTransformer2DModel

pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")

SHORT = shortened(RECIPE, steps=2, num_pictures=32, batch_size=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCRIPTS = Path(__file__).parents[2] / "scripts"


def training(folder, recipe=SHORT):
    # The checkpoint's transformer stands for the teacher too.
    return ShapesControlTraining(folder, recipe, Origin.find(str(embedded_checkpoint())), embedded_checkpoint())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which all stages have run, and the folder of the result."""
    folder = tmp_path_factory.mktemp("control")
    return folder, training(folder).run()


def test_the_result_loads_alone_is_below_four_megabytes_and_says_how_it_was_made(trained):
    _, result = trained
    control = SanaControlNetModel.from_pretrained(result)
    assert {weight.dtype for weight in load_file(result / WEIGHTS).values()} == {torch.bfloat16}
    assert control.config.num_layers == RECIPE.num_layers
    assert sum(path.stat().st_size for path in result.iterdir()) < 4e6
    record = json.loads((result / "training.json").read_text())
    assert {stage: losses["step"][-1] for stage, losses in record["losses"].items()} == {
        "control": 2,
        "distillation": 2,
        "pixels": 2,
    }


def test_the_card_tells_the_steps_of_all_stages_and_the_scores(trained, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from embed_controlnet import model_card

    _, result = trained
    scores = {"intersection_over_union": 0.25, "colours": 0.5, "open_captions": 0.75}
    evaluation = {"num_captions": 6, "guidance": 4.5, "results": [{"steps": 2, "scores": scores}]}
    card = model_card(json.loads((result / "training.json").read_text()), evaluation)
    assert "of 4 pictures: control 2 (seed 30), distillation 2 (seed 31), pixels 2 (seed 50)." in " ".join(card.split())
    assert "| 2 | 0.250 | 0.500 | 0.750 |" in card


def test_one_block_more_would_be_too_large():
    transformer = SanaTransformer2DModel.from_pretrained(embedded_checkpoint() / "transformer")
    sizes = [
        2 * sum(weight.numel() for weight in SanaControlNetModel.from_transformer(transformer, layers).parameters())
        for layers in (RECIPE.num_layers, RECIPE.num_layers + 1)
    ]
    assert sizes[0] < 4e6 < sizes[1]


def test_each_stage_moves_what_the_one_before_has_left_and_a_second_run_changes_nothing(trained):
    folder, result = trained
    first, second, third = (
        SanaControlNetModel.from_pretrained(folder / stage / "controlnet").controlnet_blocks[0].weight
        for stage in ("control", "distillation", "pixels")
    )
    assert first.any()
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    exported = load_file(result / WEIGHTS)["controlnet_blocks.0.weight"]
    torch.testing.assert_close(exported, third.bfloat16(), rtol=0, atol=0)
    before = (result / WEIGHTS).read_bytes()
    training(folder).run()
    assert (result / WEIGHTS).read_bytes() == before


def test_without_rates_the_last_stage_leaves_what_the_distillation_has_made(trained, tmp_path):
    folder, _ = trained
    still = replace(SHORT.pixels.optimiser, learning_rate=0.0, matrix_learning_rate=0.0)
    recipe = replace(SHORT, pixels=replace(SHORT.pixels, optimiser=still))
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("pixels"))
    training(tmp_path / "run", recipe).pixels()
    before, after = (
        load_file(tmp_path / "run" / stage / "controlnet" / WEIGHTS) for stage in ("distillation", "pixels")
    )
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_rehearsal_knows_the_three_stages_and_the_networks_of_the_last():
    stages = rehearse(RECIPE, shapes.RECIPE.flow.config)
    assert list(stages) == ["control", "control distillation", "pixels"]
    networks = stages["pixels"].networks
    assert list(networks) == ["transformer", "student", "vae"]
    assert networks["student"].gradients > 0 == networks["transformer"].gradients == networks["vae"].gradients


def test_the_data_are_pictures_with_their_own_edges(trained):
    folder, _ = trained
    data = training(folder).data()
    pool = picture_pool(folder / "pool", SHORT.num_pictures, SHORT.picture_size, SHORT.pool_seed)
    vae = AutoencoderDC.from_pretrained(embedded_checkpoint() / "vae", torch_dtype=torch.float32).eval()
    drawing = np.array(edges(pool.pictures[5]))[None]
    wanted = encode_pictures(vae, drawing) * vae.config.scaling_factor
    torch.testing.assert_close(data.controls[5:6], wanted, rtol=1e-4, atol=1e-4)  # float32, in another batch
    assert len(data.latents) == len(data.controls) == SHORT.num_pictures
    assert len(data.captions) == SHORT.num_pictures + 1


def test_captions_of_training_are_not_held_out_and_some_name_colours_only(tmp_path):
    captions = training(tmp_path, replace(SHORT, num_pictures=400)).captions()
    by_colours = [caption for caption, _ in captions if is_by_colours(caption)]
    # Four standard deviations of a share of 0.6.
    assert len(by_colours) / 400 == pytest.approx(RECIPE.colour_caption_share, abs=0.1)
    assert not any(are_words_held_out(caption) for caption in by_colours)
    assert not any(is_held_out(caption) for caption, _ in captions if not is_by_colours(caption))


def test_the_last_stage_learns_from_captions_only_that_leave_no_colour_open(trained):
    folder, _ = trained
    captions = training(folder).captions()
    own = [(caption, is_complete) for caption, is_complete in captions if not is_by_colours(caption)]
    assert len(own) < len(captions)
    assert {is_complete for _, is_complete in own} == {True, False}
    assert all(is_complete == parse(caption).names_all_colours for caption, is_complete in own)
    assert all(is_complete for caption, is_complete in captions if is_by_colours(caption))
    # The texts that its run began with are these, and the empty one.
    data = training(folder).data()
    kept = [place for place, (_, is_complete) in enumerate(captions) if is_complete]
    chosen = data.only(torch.tensor([is_complete for _, is_complete in captions]))
    torch.testing.assert_close(chosen.captions, data.captions[[*kept, len(captions)]], rtol=0, atol=0)
    for name in ("latents", "controls"):
        torch.testing.assert_close(getattr(chosen, name), getattr(data, name)[kept], rtol=0, atol=0)
    state = torch.load(max((folder / "pixels" / "run").glob("state-*.pt")), weights_only=True)
    assert state["settings"]["data"] == chosen.identity() != data.identity()


def is_by_colours(caption: str) -> bool:
    """Whether a caption names no shape, and so cannot be read."""
    try:
        parse(caption)
    except ValueError:
        return True
    return False
