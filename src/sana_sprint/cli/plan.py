"""`sana-sprint plan`: a model and the memory of a machine in; every way to load it there, and the best, out."""

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import amount, size, whole_number
from sana_sprint.cli.model import EMBEDDED
from sana_sprint.evaluation.tables import aligned
from sana_sprint.sizes import readable_bytes

if TYPE_CHECKING:
    from sana_sprint.memory.planner import MemoryPlan

_MODEL = "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"


def _folder_or_blocks(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--model", default=_MODEL, metavar="MODEL", help=f"a pipeline folder, a hub id, or {EMBEDDED} (%(default)s)"
    )
    parser.add_argument("--vram", type=amount, metavar="SIZE", help="memory of the GPU, such as 8GiB (this machine's)")
    parser.add_argument("--ram", type=amount, metavar="SIZE", help="memory of the machine (this machine's)")
    parser.add_argument("--cpu", action="store_true", help="plan for a machine without a GPU")
    parser.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="pixels of the pictures; planned is the nearest size of the model (that of the model)",
    )
    parser.add_argument(
        "--batch", type=whole_number(1), default=1, metavar="N", help="pictures drawn at once (%(default)s)"
    )
    parser.add_argument(
        "--init-image", action="store_true", help="for pictures that start from others: encoding these is counted too"
    )
    parser.add_argument(
        "--controlnet",
        type=_folder_or_blocks,
        metavar="CONTROLNET",
        help=f"for pictures after drawings: a ControlNet's folder, a hub id, {EMBEDDED}, or the number of its blocks",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    parser.set_defaults(run=run)


def table(plans: "list[MemoryPlan]") -> list[str]:
    """The plans in lines, with what each takes."""
    rows: list[tuple[str, ...]] = [("arrangement", *plans[0].stages, "most", "machine", "fits")]
    for plan in plans:
        peaks = (readable_bytes(stage.peak) for stage in plan.stages.values())
        host = readable_bytes(plan.host) if plan.host else "-"
        rows.append((str(plan.arrangement), *peaks, readable_bytes(plan.peak), host, "yes" if plan.fits else "no"))
    return aligned(rows)


def code_line(options: argparse.Namespace, has_gpu: bool) -> str:
    """What loads the model so, in Python."""
    arguments = [f'"{options.model}"' if options.model != EMBEDDED else "sana_sprint.embedded_checkpoint()"]
    amounts = {"memory": options.vram, "ram": options.ram} if has_gpu else {"memory": options.ram}
    arguments += [f'{name}="{_exactly(amount)}"' for name, amount in amounts.items() if amount]
    if not has_gpu:
        arguments.append('device="cpu"')
    if options.size:
        arguments.append(f"width={options.size[0]}, height={options.size[1]}")
    if options.batch != 1:
        arguments.append(f"batch_size={options.batch}")
    has_control = options.controlnet is not None
    if has_control or options.init_image:
        kind = ("ControlNet" if has_control else "") + ("Img2Img" if options.init_image else "")
        arguments.append(f"pipeline_class=sana_sprint.SanaSprint{kind}Pipeline")
    if has_control:
        arguments.append(f'controlnet="{"FOLDER" if isinstance(options.controlnet, int) else options.controlnet}"')
    return f"pipe = sana_sprint.load_pipeline({', '.join(arguments)})"


def _exactly(count: int) -> str:
    return f"{count >> 30}GiB" if count % 2**30 == 0 else f"{count / 1e9:.9g}GB"


def document(plan: "MemoryPlan") -> dict[str, Any]:
    """A plan as JSON, in bytes."""
    stages = {name: {"weights": stage.weights, "work": stage.work} for name, stage in plan.stages.items()}
    arrangement = plan.arrangement
    return {
        "bits": arrangement.bits,
        "placement": arrangement.placement,
        "tile": arrangement.tile,
        "stored": dict(plan.stored),
        "stages": stages,
        "peak": plan.peak,
        "host": plan.host,
        "fits": plan.fits,
    }


def run(options: argparse.Namespace) -> None:
    """Prints the table, the choice, and the line of code for it; fails afterwards if there is no choice."""
    if options.cpu and options.vram:
        raise ValueError("--cpu and --vram exclude each other")
    with screen.quiet_libraries():
        import torch

        from sana_sprint.assets import embedded_checkpoint, embedded_controlnet
        from sana_sprint.memory.configs import read_configs, read_controlnet
        from sana_sprint.memory.loading import budget_of
        from sana_sprint.memory.planner import all_plans, best_plan
        from sana_sprint.memory.stages import Networks, Workload

        configs = read_configs(embedded_checkpoint() if options.model == EMBEDDED else options.model)
        if options.controlnet == EMBEDDED:
            options.controlnet = str(embedded_controlnet())
        controlnet = options.controlnet
        if isinstance(controlnet, str):
            controlnet = read_controlnet(controlnet)
        configs = replace(configs, controlnet=controlnet)
        has_gpu = not options.cpu and bool(options.vram or torch.cuda.is_available())
        memory = options.vram if has_gpu else options.ram
        budget = budget_of(torch.device("cuda" if has_gpu else "cpu"), memory, options.ram if has_gpu else None)
        width, height = options.size or (None, None)
        workload = Workload.of_call(
            configs, height, width, batch_size=options.batch, starts_from_picture=options.init_image
        )
        plans = all_plans(Networks(configs, workload), budget)
    if options.json:
        documents = [document(plan) for plan in plans]
        chosen = next((index for index, plan in enumerate(plans) if plan.fits), None)
        drawn = {"width": workload.width, "height": workload.height}
        print(json.dumps({**drawn, "plans": documents, "chosen": chosen}, indent=2))
    else:
        print("\n".join(table(plans)))
    best = best_plan(plans)  # says what is missing where nothing fits
    if not options.json:
        print(f"\n{best}\n\n{code_line(options, has_gpu)}")
