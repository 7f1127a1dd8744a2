"""Tiny objectives and their training: in this process or, as a script, in others, which a test may kill."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from sana_sprint.training.distillation import Distillation, DistillationSettings
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowData, FlowObjective, FlowSettings, initialise
from sana_sprint.training.loop import train
from sana_sprint.training.optimiser import OptimiserSettings, ParameterGroup, trainable
from sana_sprint.training.settings import LoopSettings
from sana_sprint.transformer.model import SanaTransformer2DModel

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 4,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
LOOP = LoopSettings(steps=6, batch_size=8, precision="fp32", checkpoint_every=2, log_every=1, seed=3)
LONG_LOOP = replace(LOOP, steps=40)
OPTIMISER = OptimiserSettings(learning_rate=1e-2, warmup_steps=2)


def tiny_data(size: int = 16) -> FlowData:
    """Random latents and captions."""
    generator = torch.Generator().manual_seed(1)
    return FlowData(
        torch.randn(size, 4, 4, 4, generator=generator),
        torch.randn(size + 1, 5, 8, generator=generator).bfloat16(),
        torch.ones(size + 1, 5, dtype=torch.long),
    )


def tiny_teacher(**config: Any) -> SanaTransformer2DModel:
    """A transformer with random weights."""
    torch.manual_seed(0)
    return SanaTransformer2DModel(**CONFIG | config).eval()


DISTILLATION = DistillationSettings(
    student=OPTIMISER, discriminator=OPTIMISER, head_blocks=(0, 1), tangent_warmup_steps=10, compile=False
)
# Eight examples for each of two processes: batch norms of the discriminator are over eight.
DISTILLATION_LOOP = replace(LOOP, batch_size=16)


def distil(folder: Path) -> SanaTransformer2DModel:
    """The student after distillation in a folder."""
    torch.manual_seed(1)
    objective = Distillation(tiny_teacher(), tiny_data(), DISTILLATION)
    return train(objective, DISTILLATION_LOOP, folder, "tiny student", torch.device("cpu"))


class TinyFlow(FlowObjective):
    """Flow matching on random latents and captions.

    Muon trains the matrices of one group of parameters; or AdamW trains two groups. Steps may be made slow.
    """

    def __init__(self, optimiser: OptimiserSettings = OPTIMISER, use_muon: bool = True, seconds: float = 0.0) -> None:
        torch.manual_seed(0)
        transformer = SanaTransformer2DModel(**CONFIG)
        initialise(transformer)
        settings = FlowSettings(
            config=CONFIG, loop=LOOP, optimiser=optimiser, guidance_loop=LOOP, guidance_optimiser=optimiser
        )
        super().__init__(transformer, tiny_data(), settings)
        self.use_muon = use_muon
        self.seconds = seconds

    def forward(self, draws: Draws) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        return super().forward(draws)

    def groups(self) -> list[ParameterGroup]:
        (group,) = super().groups()
        if self.use_muon:
            return [group]
        in_blocks = trainable(self.transformer.transformer_blocks)
        taken = {id(parameter) for parameter in in_blocks}
        others = [parameter for parameter in group.parameters if id(parameter) not in taken]
        slower = replace(group.settings, learning_rate=1e-3, clip_norm=0.1)
        return [
            replace(group, parameters=in_blocks, matrices=()),
            ParameterGroup("outside", others, slower),
        ]


def run(folder: Path, loop: LoopSettings = LOOP, device: str = "cpu", **objective: Any) -> SanaTransformer2DModel:
    """The average after training a tiny flow in a folder."""
    return train(TinyFlow(**objective), loop, folder, "tiny flow", torch.device(device))


def refusal(attempt: Callable[[], object]) -> str:
    """The message with which something is refused; empty if it is not."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def shard_from_now_on(fsdp_version: int) -> None:
    """Have accelerate shard what it prepares; of itself it does so on accelerators alone."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=fsdp_version, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )


def run_as_one_of_several(folder: Path) -> None:
    """Train with DDP, then sharded, there stopping and going on, and note what is refused."""
    run(folder / "ddp")
    distil(folder / "distilled-ddp")
    messages: dict[str, Any] = {"other device": refusal(lambda: run(folder / "refused", device="cuda"))}
    messages["odd batch"] = refusal(lambda: run(folder / "refused", replace(LOOP, batch_size=9)))
    shard_from_now_on(fsdp_version=2)
    distil(folder / "distilled-fsdp")
    shard_from_now_on(fsdp_version=2)  # once more, for accelerate keeps what units the first network had
    run(folder / "fsdp", use_muon=False)
    if Accelerator().is_main_process:
        (folder / "fsdp" / "state-000006.pt").rename(folder / "whole.pt")
    Accelerator().wait_for_everyone()
    objective = TinyFlow(use_muon=False)
    average = train(objective, LOOP, folder / "fsdp", "tiny flow", torch.device("cpu"))
    messages["FSDP kept whole"] = [name for name, part in objective.named_parameters() if not isinstance(part, DTensor)]
    messages["Muon"] = refusal(lambda: run(folder / "refused"))
    in_8bit = replace(OPTIMISER, kind="adamw_8bit")
    messages["8 bits"] = refusal(lambda: run(folder / "refused", use_muon=False, optimiser=in_8bit))
    rank = Accelerator().process_index
    shard_from_now_on(fsdp_version=1)
    messages["FSDP 1"] = refusal(lambda: run(folder / "refused"))
    torch.save(average.state_dict(), folder / f"average-{rank}.pt")
    (folder / f"messages-{rank}.json").write_text(json.dumps(messages), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("slowly", "as-one-of-several"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.what == "slowly":
        run(options.folder, LONG_LOOP, seconds=0.2)
    else:
        run_as_one_of_several(options.folder)


if __name__ == "__main__":
    main()
