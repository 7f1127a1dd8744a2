"""The stages of the shapes recipe, run end to end with few steps, and what their losses promise."""

import json

import diffusers
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, GemmaTokenizer

from sana_sprint import SanaSprintPipeline
from sana_sprint.shapes.captions import is_held_out
from sana_sprint.text.encoder import encode_prompts
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.training.autoencoder import gradient_difference, whitening_loss
from sana_sprint.training.data import to_pictures, to_tensor
from sana_sprint.training.flow import (
    FlowData,
    encode_captions,
    guided_target,
    initialise,
    noisy_latents,
    predict_velocity,
    train_guidance,
)
from sana_sprint.training.language import RecallingModel, train_tokenizer
from sana_sprint.training.loop import Draws
from sana_sprint.training.shapes import STAGES, ShapesRecipe, ShapesTraining, shortened
from sana_sprint.transformer.model import SanaTransformer2DModel

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
    assert type(theirs.transformer) is diffusers.SanaTransformer2DModel
    for name in ("transformer", "vae"):
        ours_state, their_state = (getattr(pipe, name).state_dict() for pipe in (ours, theirs))
        assert ours_state.keys() == their_state.keys()
        assert all(torch.equal(ours_state[key], their_state[key]) for key in ours_state)


def test_the_assembled_folder_records_how_it_was_made(trained):
    record = json.loads((trained / "checkpoint" / "training.json").read_text())
    assert record["recipe"]["flow"]["optimiser"]["seed"] == RECIPE.flow.optimiser.seed
    assert record["versions"]["torch"] == torch.__version__
    assert {stage: losses[-1]["step"] for stage, losses in record["losses"].items()} == dict.fromkeys(STAGES[:-1], 2)


def test_a_second_run_finds_every_stage_done_and_changes_nothing(trained):
    weights = trained / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    ShapesTraining(trained, RECIPE).run()
    assert weights.read_bytes() == before


def test_a_stage_before_its_predecessor_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="stage 'autoencoder' has left no result"):
        ShapesTraining(tmp_path, RECIPE).run(["flow"])
    with pytest.raises(ValueError, match="stages must be of autoencoder, decoder, language"):
        ShapesTraining(tmp_path, RECIPE).run(["flwo"])


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
    assert torch.equal(masks[:-1], wanted.mask)
    is_text = wanted.mask.bool()
    # The features are stored in bfloat16, with 8 bits.
    torch.testing.assert_close(embeds[:-1][is_text].float(), wanted.embeds[is_text], rtol=2**-8, atol=1e-4)
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
    batch = data.batch(Draws.of_step(0, 0), 6, caption_dropout=1.0)
    assert torch.equal(batch.caption, data.empty_caption(6)[0])
    kept = data.batch(Draws.of_step(0, 0), 6, caption_dropout=0.0)
    assert not torch.equal(kept.caption, batch.caption)
    assert torch.equal(kept.clean, batch.clean)


def tiny_recalling_model() -> RecallingModel:
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=20, **{**RECIPE.language.config, "hidden_size": 32, "num_hidden_layers": 1})
    return RecallingModel(Gemma2ForCausalLM(config), recalled_tokens=2)


def test_a_recalling_model_learns_to_name_the_tokens_it_stands_on_and_before():
    model = tiny_recalling_model()
    ids = torch.randint(5, 20, (64, 6))
    mask = torch.ones_like(ids)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.losses(ids, mask, ids)
    for _ in range(150):
        losses = model.losses(ids, mask, ids)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
    assert first["recall"] > 2.5 > 0.1 > losses["recall"]
    # Random tokens cannot be foretold by more than learning these 64 rows by heart.
    assert losses["next_token"] > losses["recall"]


def test_padding_is_neither_foretold_nor_recalled():
    model = tiny_recalling_model()
    ids = torch.randint(5, 20, (2, 6))
    mask = torch.ones_like(ids)
    plain = model.losses(ids, mask, ids)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    with_padding = model.losses(padded, padded_mask, padded.masked_fill(padded_mask == 0, -100))
    for name, loss in plain.items():
        torch.testing.assert_close(with_padding[name], loss)


def test_the_tokenizer_gives_known_words_a_token_each_and_any_text_back():
    tokenizer = train_tokenizer(["a red circle", "a blue square, please"] * 50, vocabulary_size=400)
    assert tokenizer.tokenize("a red circle") == ["a", "▁red", "▁circle"]
    assert tokenizer.tokenize("square, please")[-2:] == [",", "▁please"]
    assert tokenizer("a red circle").input_ids[0] == tokenizer.bos_token_id
    for text in ("a red circle", "Zürich 北京 🐈"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
