"""A plain flow model made a teacher: its new norms, its new clock, and what is exported."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import teacher_recipe

from sana_sprint import SanaTransformer2DModel
from sana_sprint.training.datasets.source import LatentBatch
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowObjective
from sana_sprint.training.footprint import EmptyLatents
from sana_sprint.training.origin import Origin, open_cache, with_norms
from sana_sprint.training.sprint import check_teacher
from sana_sprint.training.teacher import make_teacher, train_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(teacher_folder):
    """A flow model with the clock of SANA and without norms of queries and keys."""
    torch.manual_seed(4)
    config = Origin.in_folder(teacher_folder).config()
    return SanaTransformer2DModel.from_config(config, qk_norm=None, timestep_scale=1.0)


def test_new_norms_start_at_one_and_are_announced(plain, caplog):
    normalised = with_norms(plain)
    added = normalised.state_dict().keys() - plain.state_dict().keys()
    assert len(added) == 4 * plain.config.num_layers
    assert all((normalised.state_dict()[name] == 1).all() for name in added)
    assert all(torch.equal(normalised.state_dict()[name], weight) for name, weight in plain.state_dict().items())
    assert [record.getMessage() for record in caplog.records] == [
        f"the transformer has no norms of queries and keys: {len(added)} new ones start at one"
    ]
    assert with_norms(normalised) is normalised


def test_a_teacher_can_be_distilled_and_what_it_was_cannot(plain, tmp_path):
    with pytest.raises(ValueError, match="times from 0 to 1000"):
        check_teacher(plain)
    check_teacher(make_teacher(teacher_recipe(tmp_path, tmp_path), plain))


def test_a_transformer_without_guidance_embedding_is_trained_whole(plain, tmp_path):
    recipe = teacher_recipe(tmp_path, tmp_path)
    teacher = make_teacher(recipe, plain)
    objective = FlowObjective(teacher, RandomLatents((4, 8, 8), (5, 32), CPU), recipe.flow)
    (group,) = objective.groups()
    assert not group.matrices
    assert {id(parameter) for parameter in group.parameters} == {id(parameter) for parameter in teacher.parameters()}
    objective(Draws.of_step(0, 0, 3))["loss"].backward()
    assert all(parameter.grad is not None for parameter in teacher.parameters())


class RandomLatents(EmptyLatents):
    """The same with content."""

    def batch(self, draws: Draws, caption_dropout: float = 0.0, misaligned: bool = False) -> LatentBatch:
        clean, caption = draws.normal(self.latent_shape), draws.normal(self.text_shape)
        return LatentBatch(clean, caption, torch.ones(draws.size, self.text_shape[0]))


def test_the_exported_teacher_draws_in_diffusers_with_its_own_clock(teacher_folder, cache_folder, plain, tmp_path):
    plain.save_pretrained(tmp_path / "plain")
    recipe = teacher_recipe(tmp_path / "plain", cache_folder)
    origin = Origin(tmp_path / "plain", teacher_folder)  # the encoders of one, the transformer of another
    checkpoint = train_teacher(recipe, origin, tmp_path / "run", CPU)
    pipe = diffusers.SanaPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert pipe.transformer.config.timestep_scale == 0.001
    latents = pipe(
        "a red circle", num_inference_steps=2, height=64, width=64, use_resolution_binning=False, output_type="latent"
    ).images
    assert latents.shape == (1, 4, 8, 8)
    assert latents.isfinite().all()
    trained = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(trained["proj_out.weight"], plain.proj_out.weight.bfloat16())


def test_data_for_another_transformer_and_none_at_all_are_refused(cache_folder, teacher_folder):
    config = Origin.in_folder(teacher_folder).config()
    other = SanaTransformer2DModel.from_config(config, caption_channels=24)
    recipe = teacher_recipe(teacher_folder, cache_folder)
    with pytest.raises(ValueError, match="reads text features of width 24, those in .* have 32"):
        open_cache(cache_folder, recipe.captions, other)
    with pytest.raises(ValueError, match="there is no data: give --set data=FOLDER"):
        open_cache(None, recipe.captions, other)


def test_a_folder_of_neither_a_pipeline_nor_a_transformer_is_no_origin(tmp_path, teacher_folder):
    with pytest.raises(ValueError, match="neither a pipeline nor a transformer in diffusers' layout"):
        Origin.in_folder(tmp_path)
    assert Origin.in_folder(teacher_folder) == Origin(teacher_folder / "transformer", teacher_folder)
    assert Origin.in_folder(teacher_folder / "transformer") == Origin(teacher_folder / "transformer", None)
