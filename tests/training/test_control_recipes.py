"""ControlNets trained by the recipes at full size, with tiny numbers: what is written, what loads, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import LOOP, OPTIMISER

from sana_sprint import SanaControlNetModel, SanaTransformer2DModel
from sana_sprint.training.control_sprint import sprint_control_objective, train_sprint_control
from sana_sprint.training.control_teacher import train_control_teacher
from sana_sprint.training.datasets.cached import CachedLatents
from sana_sprint.training.datasets.captions import CaptionChoice
from sana_sprint.training.distillation import DistillationSettings, student_of
from sana_sprint.training.draws import Draws
from sana_sprint.training.origin import Origin
from sana_sprint.training.recipes import find_recipe

CPU = torch.device("cpu")


def tiny(recipe, **changes):
    common = {"captions": CaptionChoice(), "teacher_dtype": "fp32", "num_layers": 1, "loop": LOOP}
    return replace(recipe, **common, **changes)


def control_recipe(teacher, data):
    recipe = find_recipe("control_1.6b_1024")
    flow = replace(recipe.flow, optimiser=OPTIMISER)
    return tiny(recipe, teacher=str(teacher), data=data, flow=flow)


def sprint_recipe(teacher, control, student, data, **changes):
    distillation = DistillationSettings(
        student=OPTIMISER, discriminator=OPTIMISER, head_blocks=(0, 1), tangent_warmup_steps=2, compile=False
    )
    networks = {"teacher": str(teacher), "control": str(control), "student": str(student), "data": data}
    return tiny(find_recipe("sprint_control_1.6b_1024"), **networks, distillation=distillation, **changes)


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory):
    """A transformer that stands for the distilled one."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("student")
    student_of(Origin.in_folder(teacher_folder).load()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def control_folder(teacher_folder, controlled_cache_folder, tmp_path_factory):
    """What the first stage leaves."""
    recipe = control_recipe(teacher_folder, controlled_cache_folder)
    return train_control_teacher(recipe, Origin.find(recipe.teacher), tmp_path_factory.mktemp("control"), CPU)


def test_the_first_stage_leaves_a_control_net_that_loads_alone_and_says_how_it_was_made(control_folder):
    control = SanaControlNetModel.from_pretrained(control_folder)
    weights = load_file(control_folder / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert control.config.residual_placement == "before"
    assert all(parameter.any() for parameter in control.controlnet_blocks.parameters())  # they have left zero
    record = json.loads((control_folder / "training.json").read_text())
    assert record["losses"]["control"]["step"] == [1, 2]
    assert "_name_or_path" not in json.loads((control_folder / "config.json").read_text())


def test_a_control_net_of_another_kind_does_not_go_on_with_a_run(
    teacher_folder, control_folder, controlled_cache_folder
):
    recipe, output = control_recipe(teacher_folder, controlled_cache_folder), control_folder.parent
    train_control_teacher(recipe, Origin.find(recipe.teacher), output, CPU)
    other = replace(recipe, residual_placement="after")
    with pytest.raises(ValueError, match=r"belongs to a run with other settings or data \(.*residual_placement.*\)"):
        train_control_teacher(other, Origin.find(recipe.teacher), output, CPU)


def test_the_second_stage_leaves_one_for_the_student(
    teacher_folder, control_folder, student_folder, controlled_cache_folder, tmp_path
):
    recipe = sprint_recipe(teacher_folder, control_folder, student_folder, controlled_cache_folder)
    folder = train_sprint_control(recipe, tmp_path, CPU)
    control = SanaControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
    student = SanaTransformer2DModel.from_pretrained(student_folder)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, student.config.caption_channels),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([0.45]),
        "return_dict": False,
    }
    (samples,) = control(**inputs, controlnet_cond=torch.randn(1, 4, 8, 8))
    assert not torch.equal(student(**inputs, controlnet_block_samples=samples)[0], student(**inputs)[0])


def test_blocks_that_are_run_again_change_no_loss_and_no_gradient(
    teacher_folder, control_folder, student_folder, controlled_cache_folder
):
    objectives = []
    for gradient_checkpointing in (False, True):
        recipe = sprint_recipe(
            teacher_folder,
            control_folder,
            student_folder,
            controlled_cache_folder,
            gradient_checkpointing=gradient_checkpointing,
        )
        torch.manual_seed(0)
        control = SanaControlNetModel.from_pretrained(control_folder, torch_dtype=torch.float32)
        teacher, student = (Origin.in_folder(folder).load() for folder in (teacher_folder, student_folder))
        data = CachedLatents(controlled_cache_folder)
        objectives.append(sprint_control_objective(recipe, teacher, control, student, data).train())
    losses = [objective(Draws.of_step(0, 5, 3)) for objective in objectives]
    for each in losses:
        each["loss"].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0]["derivative_norm"] > 0
    wanted, found = ({name: p.grad for name, p in each.named_parameters() if p.requires_grad} for each in objectives)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # float32, in another order of sums


def test_what_cannot_work_is_refused_before_any_training(
    teacher_folder, cache_folder, controlled_cache_folder, control_folder, tmp_path
):
    recipe = control_recipe(teacher_folder, cache_folder)
    with pytest.raises(ValueError, match=r"holds nothing to control by: .*cache-latents --control edges"):
        train_control_teacher(recipe, Origin.find(recipe.teacher), tmp_path, CPU)
    plain = sprint_recipe(teacher_folder, control_folder, teacher_folder, controlled_cache_folder)
    with pytest.raises(ValueError, match="is no Sprint model: it does not embed its guidance"):
        train_sprint_control(plain, tmp_path, CPU)
    assert not any(tmp_path.iterdir())
    for changed in (recipe, plain):
        with pytest.raises(ValueError, match="teacher_dtype bf16 needs loop.precision bf16"):
            replace(changed, teacher_dtype="bf16")
    with pytest.raises(ValueError, match=r"gradient_checkpointing and flow.compile exclude each other"):
        replace(recipe, flow=replace(recipe.flow, compile=True))
    with pytest.raises(ValueError, match=r"gradient_checkpointing and distillation.compile exclude each other"):
        replace(plain, distillation=replace(plain.distillation, compile=True))
