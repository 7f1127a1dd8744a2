"""Every arrangement on a GPU: the picture it draws, and the memory that was planned for it."""

from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Model, GemmaTokenizer

from sana_sprint import (
    AutoencoderDC,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    embedded_checkpoint,
    load_pipeline,
)
from sana_sprint.memory.loading import load_as_planned
from sana_sprint.memory.planner import ARRANGEMENTS, Budget, all_plans
from sana_sprint.memory.stages import Networks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda", 0)


def drawn(pipe: SanaSprintPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle on white", num_inference_steps=1, generator=generator, output_type="pt").images.cpu()


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_every_arrangement_draws_what_its_bits_draw_all_resident(arrangement, small):
    plans = {plan.arrangement: plan for plan in all_plans(small, Budget(2**40))}
    pipe = load_as_planned(embedded_checkpoint(), plans[arrangement], GPU, torch.bfloat16)
    resident = plans[replace(arrangement, placement="resident")]
    expected = drawn(load_as_planned(embedded_checkpoint(), resident, GPU, torch.bfloat16))
    # A text encoder on the host has 16 bits, and the CPU's roundings.
    share = 0.4 if arrangement.placement == "encoder on host" else 0.02
    assert (drawn(pipe) - expected).norm() <= share * expected.norm()


def test_what_is_free_on_the_gpu_is_what_counts_where_nothing_is_said():
    plan = load_pipeline(embedded_checkpoint()).memory_plan
    assert plan.budget.device <= torch.cuda.mem_get_info()[1]
    assert plan.arrangement == ARRANGEMENTS[0]


@pytest.fixture(scope="module")
def full_size(sprint) -> SanaSprintPipeline:
    """Sprint 1.6B with random weights, in the machine's memory."""

    def filled(make) -> torch.nn.Module:
        with torch.device("meta"):
            model = make().to(torch.bfloat16)
        model = model.to_empty(device=GPU)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.normal_(std=0.02)
        return model.eval().to("cpu")

    return SanaSprintPipeline(
        tokenizer=GemmaTokenizer.from_pretrained(embedded_checkpoint() / "tokenizer"),
        text_encoder=filled(lambda: Gemma2Model(sprint.configs.text_encoder)),
        transformer=filled(lambda: SanaTransformer2DModel.from_config(sprint.configs.transformer)),
        vae=filled(lambda: AutoencoderDC.from_config(sprint.configs.vae)),
        scheduler=SCMScheduler(),
    )


@pytest.mark.parametrize("placement", ["model offload", "resident"])
def test_a_full_size_picture_takes_what_was_planned_within_a_tenth(
    placement, full_size: SanaSprintPipeline, sprint: Networks
):
    plan = next(one for one in all_plans(sprint, Budget(2**40)) if str(one.arrangement) == f"16-bit, {placement}")
    if placement == "resident":
        full_size.remove_all_hooks()
        full_size.to(GPU)
    else:
        full_size.enable_model_cpu_offload(device=GPU)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    drawn(full_size)
    assert torch.cuda.max_memory_allocated() == pytest.approx(plan.peak, rel=0.1)
