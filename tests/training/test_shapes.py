"""The stages of the shapes recipe, run end to end with few steps, and what their losses promise."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, GemmaTokenizer

from sana_sprint import AutoencoderDC, SanaSprintPipeline
from sana_sprint.shapes.captions import is_held_out
from sana_sprint.shapes.questions import NUM_ANSWERS
from sana_sprint.text.encoder import encode_prompts
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.training.autoencoder import (
    EncoderObjective,
    gradient_difference,
    outlines,
    whitening_loss,
    with_new_encoder,
)
from sana_sprint.training.data import PicturePool, to_pictures, to_tensor
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import (
    FlowData,
    block_matrices,
    encode_captions,
    guided_target,
    initialise,
    noisy_latents,
    predict_velocity,
    train_guidance,
)
from sana_sprint.training.language import CaptionBatch, ReadingModel
from sana_sprint.training.recipes.shapes import ShapesRecipe, shortened
from sana_sprint.training.shapes import ShapesTraining
from sana_sprint.training.stages import STAGES
from sana_sprint.transformer.model import SanaTransformer2DModel

SCRIPTS = Path(__file__).parents[2] / "scripts"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECIPE = shortened(ShapesRecipe(), steps=2, num_pictures=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which all stages have run, for two steps each."""
    folder = tmp_path_factory.mktemp("shapes")
    ShapesTraining(folder, RECIPE).run()
    return folder


def test_the_assembled_folder_draws_in_our_pipeline_and_loads_in_diffusers(trained):
    ours = SanaSprintPipeline.from_pretrained(trained / "checkpoint")
    ours.set_progress_bar_config(disable=True)
    picture = ours("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (64, 64)
    theirs = diffusers.SanaSprintPipeline.from_pretrained(trained / "checkpoint")
    assert type(theirs.scheduler) is diffusers.SCMScheduler
    assert type(theirs.transformer) is diffusers.SanaTransformer2DModel
    for name in ("transformer", "vae"):
        ours_state, their_state = (getattr(pipe, name).state_dict() for pipe in (ours, theirs))
        assert ours_state.keys() == their_state.keys()
        assert all(torch.equal(ours_state[key], their_state[key]) for key in ours_state)


def test_the_assembled_folder_records_how_it_was_made(trained):
    record = json.loads((trained / "checkpoint" / "training.json").read_text())
    configs = [(trained / "checkpoint" / name / "config.json").read_text() for name in ("transformer", "vae")]
    assert not any(str(trained) in config for config in configs)
    assert record["recipe"]["flow"]["loop"]["seed"] == RECIPE.flow.loop.seed
    assert record["versions"]["torch"] == torch.__version__
    assert {stage: losses["step"][-1] for stage, losses in record["losses"].items()} == dict.fromkeys(STAGES[:-1], 2)


def test_the_card_tells_every_stage_what_went_on_by_hand_and_the_scores(trained, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from embed_checkpoint import model_card

    record = json.loads((trained / "checkpoint" / "training.json").read_text())
    record["went_on"] = [{"runs": [{"steps": 1200, "seed": 7}], "result": "its average"}]
    result = {"steps": 2, "scores": {"two_objects": 0.25, "overall": 0.5}, "frechet": {"distance": 0.0625}}
    evaluation = {"num_captions": 6, "guidance": 4.5, "results": [result]}
    card = model_card(record, evaluation, {"2": [1.5, 1.1, 0]})
    text = " ".join(card.split())
    for stage, seed in (
        ("pictures", 1),
        ("encoder", 16),
        ("one_step", 51),
        ("matching", 101),
        ("expansion", 221),
        ("several_steps", 261),
    ):
        assert f"{stage} {seed}" in text
    assert all(f" {stage} " in text for stage in STAGES[:-1])
    assert "went on from what that command made, by hand: by 1,200 steps (seed 7) to its average." in text
    assert "| 2 | 1.5, 1.1, 0 | 0.250 | 0.500 | 0.0625 |" in card


def test_a_second_run_finds_every_stage_done_and_changes_nothing(trained):
    weights = trained / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    ShapesTraining(trained, RECIPE).run()
    assert weights.read_bytes() == before


def test_a_stage_before_its_predecessor_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="stage 'autoencoder' has left no result"):
        ShapesTraining(tmp_path, RECIPE).run(["flow"])
    with pytest.raises(ValueError, match="stages must be of autoencoder, decoder, encoder, language"):
        ShapesTraining(tmp_path, RECIPE).run(["flwo"])


def test_the_student_is_distilled_in_seven_stages_and_is_what_is_assembled(trained):
    stages = (
        "guidance",
        "consistency",
        "distillation",
        "adversarial",
        "one_step",
        "matching",
        "expansion",
        "several_steps",
    )
    networks = [load_file(trained / stage / "transformer" / WEIGHTS) for stage in stages]
    teacher, *_, student = networks
    assembled = load_file(trained / "checkpoint" / "transformer" / WEIGHTS)
    assert assembled.keys() == student.keys()
    blocks = {int(name.split(".")[1]) for name in student.keys() - teacher.keys()}
    assert blocks == {RECIPE.student_layers - 1} == {RECIPE.flow.config["num_layers"]}
    is_deep = [any(name.startswith(f"transformer_blocks.{max(blocks)}.") for name in network) for network in networks]
    assert dict(zip(stages, is_deep, strict=True)) == {stage: stage in stages[-2:] for stage in stages}
    # It is shown less noise than it was taught.
    student["patch_embed.proj.weight"] *= 0.92
    assert all(torch.equal(assembled[name], weight.bfloat16()) for name, weight in student.items())
    # Two short steps apart each.
    weights = [network["proj_out.weight"] for network in networks]
    assert not any(torch.equal(before, after) for before, after in pairwise(weights))


def test_matching_may_be_left_out_of_any_stage(trained, tmp_path):
    def without(settings):
        return replace(settings, matching_weight=0.0, adversarial_weight=0.5)

    recipe = replace(RECIPE, distillation=without(RECIPE.distillation), matching=without(RECIPE.matching))
    for stage in ("guidance", "autoencoder", "decoder", "language", "consistency", "flow", "pool"):
        shutil.copytree(trained / stage, tmp_path / stage)
    ShapesTraining(tmp_path, recipe).run(
        ["distillation", "adversarial", "one_step", "matching", "expansion", "several_steps"]
    )
    left = {stage for stage in STAGES if (tmp_path / stage / "fake_score").is_dir()}
    assert left == {"adversarial", "one_step", "expansion", "several_steps"}


def test_the_assembled_autoencoder_has_the_smaller_encoder_before_the_trained_decoder(trained):
    original, decoder, assembled = (
        load_file(folder / "vae" / WEIGHTS)
        for folder in (trained / "autoencoder", trained / "decoder", trained / "checkpoint")
    )
    decodes = {name for name in decoder if name.startswith("decoder.")}
    assert all(torch.equal(assembled[name], decoder[name].bfloat16()) for name in decodes)
    assert not all(torch.equal(original[name], decoder[name]) for name in decodes)
    assert {name for name in assembled if name.startswith("decoder.")} == decodes
    sizes = [sum(state[name].numel() for name in state.keys() - decodes) for state in (original, assembled)]
    assert 4 * sizes[1] < sizes[0]


def test_outlines_are_white_where_neighbours_differ():
    pixels = torch.full((1, 3, 4, 4), -0.2)
    pixels[0, 1, 1:3, 1:3] = 0.4  # one channel of a square, by more than the least difference
    pixels[0, 2, 3, 3] = 0.2  # a pixel, by less
    wanted = [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    drawn = outlines(pixels)
    assert drawn.shape == pixels.shape
    assert all(torch.equal(channel, 2.0 * torch.tensor(wanted) - 1) for channel in drawn[0])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_encoder_sees_drawings_as_often_as_it_is_told_to(trained, share):
    settings, pool = replace(RECIPE.autoencoder, encoder_drawings=share), ShapesTraining(trained, RECIPE).pool()
    original = AutoencoderDC(**settings.config)
    seen = []
    for encoder in (original.encoder, (new := with_new_encoder(original, settings)).encoder):
        encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    EncoderObjective(new, original, pool, settings)(Draws.of_step(0, 0, 4))
    pictures = pool.batch(Draws.of_step(0, 0, 4))
    wanted = outlines(pictures) if share else pictures
    assert len(seen) == 2
    assert all(torch.equal(each, wanted) for each in seen)


def test_an_encoder_learns_the_latents_of_another(trained):
    settings, pool = RECIPE.autoencoder, ShapesTraining(trained, RECIPE).pool()
    torch.manual_seed(0)
    original = AutoencoderDC(**settings.config)
    draws = Draws.of_step(0, 0, 8)
    same = EncoderObjective(copy.deepcopy(original), original, pool, settings)
    assert same(draws)["loss"] == 0
    objective = EncoderObjective(with_new_encoder(original, settings), original, pool, settings)
    assert all(
        parameter.requires_grad is name.startswith("vae.encoder.") for name, parameter in objective.named_parameters()
    )
    optimiser = torch.optim.AdamW(objective.groups()[0].parameters, lr=2e-3)
    first = objective(draws)["loss"].item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = objective(draws)["loss"]
        loss.backward()
        optimiser.step()
    assert loss < first / 4


def test_other_pictures_are_encoded_anew(trained, tmp_path):
    for stage in ("autoencoder", "decoder", "language", "flow"):
        shutil.copytree(trained / stage, tmp_path / stage)
    fewer = replace(RECIPE, num_pictures=16)
    assert len(ShapesTraining(tmp_path, RECIPE).flow_data().latents) == RECIPE.num_pictures
    assert len(ShapesTraining(tmp_path, fewer).flow_data().latents) == 16
    with pytest.raises(ValueError, match=r"other settings or data \(data\)"):
        ShapesTraining(tmp_path, fewer).run(["flow"])


def test_a_start_does_not_stand_for_a_stage_that_has_not_run(trained, tmp_path):
    with pytest.raises(ValueError, match="stage 'guidance' has left no result"):
        ShapesTraining(tmp_path, RECIPE, start=trained / "checkpoint").run(["consistency"])


def test_no_training_caption_is_held_out(trained):
    captions = ShapesTraining(trained, RECIPE).pool().captions
    assert len(captions) == RECIPE.num_pictures
    assert not any(is_held_out(caption) for caption in captions)


def test_captions_read_behind_the_kept_instruction_are_those_of_a_pipeline(trained):
    tokenizer = GemmaTokenizer.from_pretrained(trained / "language" / "tokenizer")
    text_encoder = Gemma2Model.from_pretrained(trained / "language" / "text_encoder")
    captions = ["a red circle", "Two small blue squares.", "a star above a cross"]
    embeds, masks = encode_captions(tokenizer, text_encoder, captions, length=32)
    with torch.no_grad():
        wanted = encode_prompts(
            tokenizer,
            text_encoder,
            captions,
            device="cpu",
            dtype=torch.float32,
            max_sequence_length=32,
            instruction=COMPLEX_HUMAN_INSTRUCTION,
        )
    longest = masks.shape[1]
    assert wanted.mask[:, longest:].sum() == 0
    assert torch.equal(masks[:-1], wanted.mask[:, :longest])
    is_text = wanted.mask[:, :longest].bool()
    # The features are stored in bfloat16, with 8 bits.
    torch.testing.assert_close(embeds[:-1][is_text].float(), wanted.embeds[:, :longest][is_text], rtol=2**-8, atol=1e-4)
    with pytest.raises(ValueError, match="captions must fit 3 tokens, found one of"):
        encode_captions(tokenizer, text_encoder, captions, length=3)


def test_pictures_survive_the_way_to_tensors_and_back():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(to_pictures(to_tensor(pictures)), pictures)


def test_white_latents_cost_nothing_and_shifted_or_scaled_ones_do():
    latents = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert whitening_loss(latents) < 1e-3
    assert whitening_loss(latents + 1) == pytest.approx(1, rel=0.05)
    assert whitening_loss(latents * 3) == pytest.approx(4, rel=0.05)


def test_gradient_difference_sees_edges_and_not_brightness():
    flat = torch.zeros(1, 3, 8, 8)
    edge = flat.clone()
    edge[..., 4:] = 1
    assert gradient_difference(flat, flat + 0.5) == 0
    assert gradient_difference(flat, edge) == pytest.approx(1 / 7)


def test_latents_run_straight_from_data_to_noise():
    clean, noise = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
    assert noisy_latents(clean, noise, torch.tensor([0.0, 0.25, 1.0])).flatten().tolist() == [0.0, 0.25, 1.0]


def tiny_flow():
    """A transformer with weights that matter, and data for it."""
    torch.manual_seed(0)
    config = {**RECIPE.flow.config, "num_layers": 1}
    transformer = SanaTransformer2DModel(**config)
    generator = torch.Generator().manual_seed(1)
    data = FlowData(
        torch.randn(8, 16, 8, 8, generator=generator),
        torch.randn(9, 5, 128, generator=generator).bfloat16(),
        torch.ones(9, 5, dtype=torch.long),
    )
    return transformer, data


def test_a_fresh_transformer_is_silent_and_blind_to_guidance():
    transformer, data = tiny_flow()
    torch.nn.init.normal_(transformer.proj_out.weight)
    initialise(transformer)
    arguments = (data.latents, torch.full((8,), 0.5), data.captions[:8].float(), data.masks[:8])
    assert predict_velocity(transformer, *arguments, torch.ones(8)).abs().max() == 0
    torch.nn.init.normal_(transformer.proj_out.weight)
    assert torch.equal(*(predict_velocity(transformer, *arguments, torch.full((8,), w)) for w in (1.0, 5.0)))


def test_the_guided_target_is_on_average_classifier_free_guidance():
    generator = torch.Generator().manual_seed(0)
    with_caption, without = torch.randn(2, 3, 4, 2, 2, generator=generator)
    guidance = torch.tensor([1.0, 2.5, 6.0])
    # Data whose velocity is exactly the one with the caption stand for the mean over all data.
    target = guided_target(torch.zeros_like(with_caption), with_caption, with_caption, without, guidance)
    wanted = without + guidance.view(-1, 1, 1, 1) * (with_caption - without)
    torch.testing.assert_close(target, wanted)
    assert torch.equal(target[0], with_caption[0])


def test_guidance_training_moves_the_student_and_leaves_the_teacher_alone(tmp_path):
    transformer, data = tiny_flow()
    initialise(transformer)
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    student = train_guidance(transformer, data, RECIPE.flow, tmp_path, torch.device("cpu"))
    assert all(torch.equal(before[key], value) for key, value in transformer.state_dict().items())
    assert not torch.equal(student.proj_out.weight, before["proj_out.weight"])


def test_dropped_captions_are_the_empty_one():
    _, data = tiny_flow()
    batch = data.batch(Draws.of_step(0, 0, 6), caption_dropout=1.0)
    assert torch.equal(batch.caption, data.empty_caption(6)[0])
    kept = data.batch(Draws.of_step(0, 0, 6), caption_dropout=0.0)
    assert not torch.equal(kept.caption, batch.caption)
    assert torch.equal(kept.clean, batch.clean)


def tiny_reading_model() -> ReadingModel:
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=20, **{**RECIPE.language.config, "hidden_size": 32, "num_hidden_layers": 1})
    return ReadingModel(Gemma2ForCausalLM._from_config(config, attn_implementation="eager"), recalled_tokens=2)


def tiny_caption_batch() -> CaptionBatch:
    """Random captions behind an instruction, which ask for one of three things at random."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 20, (64, 6), generator=generator)
    wanted = torch.randint(0, 3, (64, len(NUM_ANSWERS)), generator=generator)
    return CaptionBatch(torch.tensor([[2, 3, 4]]), ids, torch.ones_like(ids), wanted)


def test_a_reading_model_learns_to_name_what_it_has_read_and_to_answer():
    model, batch = tiny_reading_model(), tiny_caption_batch()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.losses(batch)
    for _ in range(150):
        losses = model.losses(batch)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
    assert first["recall"] > 2.5 > 0.1 > losses["recall"]
    assert first["answers"] > 1 > 0.5 > losses["answers"]
    # Random tokens cannot be foretold by more than learning these 64 rows by heart.
    assert losses["next_token"] > losses["recall"]


def test_padding_is_neither_foretold_nor_recalled_nor_the_last_token():
    model, batch = tiny_reading_model(), tiny_caption_batch()
    plain = model.losses(batch)
    padding = torch.zeros(64, 3, dtype=torch.long)
    padded = replace(batch, ids=torch.cat([batch.ids, padding], dim=1), mask=torch.cat([batch.mask, padding], dim=1))
    for name, loss in model.losses(padded).items():
        torch.testing.assert_close(loss, plain[name])


def test_the_end_token_does_not_help_to_answer():
    model, batch = tiny_reading_model(), tiny_caption_batch()
    other_end = replace(batch, ids=torch.cat([batch.ids[:, :-1], batch.ids[:, -1:] % 15 + 5], dim=1))
    assert not torch.equal(other_end.ids, batch.ids)
    assert torch.equal(model.losses(other_end)["answers"], model.losses(batch)["answers"])


def test_captions_are_drawn_as_often_as_they_are_long():
    lengths = torch.tensor([1, 2, 5, 1])  # the last is the empty caption, which is not drawn
    masks = (torch.arange(5) < lengths[:, None]).long()
    data = FlowData(torch.arange(3.0)[:, None, None, None], torch.zeros(4, 5, 2), masks)
    drawn = data.batch(Draws.of_step(0, 0, 10_000)).clean.flatten().long()
    shares = torch.bincount(drawn) / len(drawn)
    # Four standard deviations of a share of a half.
    torch.testing.assert_close(shares, torch.tensor([1, 2, 5]) / 8, atol=0.02, rtol=0)


def test_a_wrong_caption_is_that_of_another_example():
    _, data = tiny_flow()
    batch = data.batch(Draws.of_step(0, 0, 500), misaligned=True)
    captions = data.captions[:-1].float().flatten(1)
    own, wrong = (torch.cdist(each.flatten(1), captions).argmin(1) for each in (batch.caption, batch.wrong_caption))
    assert torch.equal(data.latents[own], batch.clean)
    assert not (own == wrong).any()
    assert wrong.unique().tolist() == list(range(8))
    assert batch.wrong_mask.shape == batch.mask.shape


def test_half_of_the_pictures_of_a_pool_are_mirrored():
    pictures = np.zeros((3, 2, 2, 3), np.uint8)
    pictures[:, :, 0] = np.array([50, 100, 200])[:, None, None]
    pixels = PicturePool(pictures, ["", "", ""]).batch(Draws.of_step(0, 0, 400))
    is_mirrored = pixels[:, 0, 0, 0] == -1
    # Four standard deviations of a share of a half.
    assert is_mirrored.float().mean() == pytest.approx(0.5, abs=0.1)
    shown = ((pixels.amax(dim=(1, 2, 3)) + 1) * 127.5).round()
    assert shown.unique().tolist() == [50, 100, 200]


def test_training_goes_on_from_a_checkpoint(trained, tmp_path):
    start = trained / "checkpoint"
    recipe = replace(RECIPE, flow=replace(RECIPE.flow, optimiser=replace(RECIPE.flow.optimiser, learning_rate=0.0)))
    checkpoint = ShapesTraining(tmp_path, recipe, start=start).run()
    record = json.loads((checkpoint / "training.json").read_text())
    assert record["started_from"] == json.loads((start / "training.json").read_text())
    distilled = ["consistency", "distillation", "adversarial", "one_step", "matching", "expansion", "several_steps"]
    assert list(record["losses"]) == ["flow", "guidance", *distilled]
    for part in (f"vae/{WEIGHTS}", "text_encoder/model.safetensors"):
        before, after = (load_file(folder / part) for folder in (start, checkpoint))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # AdamW's rate was zero here, so what it trains is that of the start, which had moved from where it was initialised.
    flow = load_file(tmp_path / "flow" / "transformer" / WEIGHTS)
    given = load_file(start / "transformer" / WEIGHTS)
    assert torch.equal(flow["proj_out.weight"].bfloat16(), given["proj_out.weight"])
    assert given["proj_out.weight"].any()


def test_what_is_no_checkpoint_of_the_recipe_is_no_start(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint that this recipe has assembled"):
        ShapesTraining(tmp_path, RECIPE, start=tmp_path)


def test_matrices_of_the_blocks_are_those_with_two_dimensions_that_multiply():
    transformer, _ = tiny_flow()
    taken = {id(matrix) for matrix in block_matrices(transformer)}
    names = {name for name, parameter in transformer.named_parameters() if id(parameter) in taken}
    assert "transformer_blocks.0.ff.conv_inverted.weight" in names
    assert "transformer_blocks.0.attn2.to_k.weight" in names
    left = {name for name, _ in transformer.named_parameters()} - names
    assert {name for name in left if name.startswith("transformer_blocks.0.")} >= {
        "transformer_blocks.0.scale_shift_table",
        "transformer_blocks.0.ff.conv_depth.weight",
    }
    assert all(name.startswith("transformer_blocks.") for name in names)
