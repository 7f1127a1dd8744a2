"""SANA-Sprint's ablations, rerun at small scale: what each part of the distillation is worth on the shapes world.

python scripts/ablate_distillation.py students RUN [--steps 400]    judge and Fréchet distance of one student a variant
python scripts/ablate_distillation.py gradients RUN [--steps 400]   gradient norms by scale of time and by qk-norm

RUN is the folder of a shapes training whose guidance stage is done. Results are added to the JSON file of --output; a
variant that is there already, of as many steps, is not trained again. Trainings are kept below RUN/ablations, and go on
from where they stopped.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from measure_distillation import SCM_AND_LADD
from sana_sprint import SanaSprintPipeline, SCMScheduler
from sana_sprint.assets import embedded_checkpoint
from sana_sprint.bench.machine import describe
from sana_sprint.evaluation.features import AutoencoderFeatures
from sana_sprint.evaluation.shapes import DistanceToRenderings, held_out_captions
from sana_sprint.shapes.judge import score
from sana_sprint.training.distillation import Distillation
from sana_sprint.training.flow import FlowData, train_flow
from sana_sprint.training.loop import train
from sana_sprint.training.recipes.shapes import RECIPE
from sana_sprint.training.shapes import ShapesTraining
from sana_sprint.transformer.model import SanaTransformer2DModel

CPU = torch.device("cpu")
SEED, GUIDANCE = 2025, 4.5

# Tables 3, 4 and 6 of the paper. A student of one scale never learns what the others do, as one without an embedding.
STUDENTS: dict[str, dict[str, Any]] = {
    "sCM and LADD": {},
    "sCM alone": {"adversarial_weight": 0.0},
    "LADD alone": {"consistency_weight": 0.0},
    "one guidance scale": {"guidance_scales": (4.5,)},
    "no pure noise": {"max_time_share": 0.0},
    "70 % pure noise": {"max_time_share": 0.7},
}
# What makes the tangent explode in a plain SANA teacher, and was removed from Sprint's.
TEACHERS: dict[str, dict[str, Any]] = {
    "time to 1, qk-norm": {"largest_time": 1, "qk_norm": "rms_norm_across_heads"},
    "time to 1": {"largest_time": 1, "qk_norm": None},
    "time to 1000, qk-norm": {"largest_time": 1000, "qk_norm": "rms_norm_across_heads"},
    "time to 1000": {"largest_time": 1000, "qk_norm": None},
}


class ToThousand(SanaTransformer2DModel):
    """The same network, which embeds times from 0 to 1000."""

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, timestep: Any, **others: Any) -> Any:
        return super().forward(hidden_states, encoder_hidden_states, 1000 * timestep, **others)


def scores(transformer: SanaTransformer2DModel, checkpoint: Path, num_captions: int) -> dict[str, dict[str, float]]:
    """Judge and Fréchet distance at 1, 2 and 4 steps; texts and latents are those of a checkpoint."""
    pipe = SanaSprintPipeline.from_pretrained(checkpoint, transformer=transformer.eval(), torch_dtype=torch.float32)
    pipe.scheduler = SCMScheduler()
    pipe.set_progress_bar_config(disable=True)
    held_out = held_out_captions(num_captions, SEED)
    distance = DistanceToRenderings(held_out, AutoencoderFeatures(pipe.vae))

    def pictures(steps: int) -> list[np.ndarray]:
        def draw(captions: Sequence[str], num_drawn: int) -> list[np.ndarray]:
            seeds = range(SEED + num_drawn, SEED + num_drawn + len(captions))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            images = pipe(
                list(captions), num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators
            ).images
            return [np.asarray(image) for image in images]

        return held_out.drawn(draw)

    found = {steps: pictures(steps) for steps in (1, 2, 4)}
    return {
        str(steps): {"judge": score(drawn, held_out.requests)["overall"], "frechet": distance(drawn)}
        for steps, drawn in found.items()
    }


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def folder_of(name: str, options: argparse.Namespace) -> Path:
    return options.run / "ablations" / f"{name.replace(' ', '-')}-{options.steps}"


def teacher_of(run: Path) -> SanaTransformer2DModel:
    return SanaTransformer2DModel.from_pretrained(run / "guidance" / "transformer")


def measure_student(data: FlowData, name: str, change: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Scores of a student that is trained with other settings, and the last line of its log."""
    # The discriminator is drawn at random.
    torch.manual_seed(RECIPE.distillation_loop.seed)
    settings = replace(SCM_AND_LADD, compile=not options.eager, **change)
    objective = Distillation(teacher_of(options.run), data, settings)
    loop = replace(RECIPE.distillation_loop, steps=options.steps)
    folder = folder_of(name, options)
    student = train(objective, loop, folder, name, CPU)
    return {"scores": scores(student, options.checkpoint, options.captions), "last": log_of(folder)[-1]}


def converted(teacher: SanaTransformer2DModel, largest_time: int, qk_norm: str | None) -> SanaTransformer2DModel:
    """A network of another kind with those of the teacher's weights that it has too; it has to be trained further."""
    kind = SanaTransformer2DModel if largest_time == 1 else ToThousand
    changed = kind.from_config(teacher.config, qk_norm=qk_norm)
    weights = teacher.state_dict()
    changed.load_state_dict({name: weights[name] for name in changed.state_dict()})
    return changed


def measure_gradients(data: FlowData, name: str, config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The norm of the student's gradient in each step of sCM alone, of a teacher that was first trained as it is.

    The student has a quarter of the teacher's steps.
    """
    folder = folder_of(f"teacher {name}", options)
    flow_loop = replace(RECIPE.flow.loop, steps=options.steps)
    flow = replace(RECIPE.flow, compile=not options.eager)
    teacher = train_flow(converted(teacher_of(options.run), **config), data, flow, flow_loop, folder / "flow", CPU)
    # Without warm-up and in float32: the derivative as it is, at the one scale that the flow was trained for.
    settings = replace(SCM_AND_LADD, adversarial_weight=0.0, guidance_scales=(1.0,), compile=not options.eager)
    objective = Distillation(teacher, data, settings)
    loop = replace(RECIPE.distillation_loop, steps=options.steps // 4, log_every=1, precision="fp32")
    train(objective, loop, folder / "student", name, CPU)
    entries = log_of(folder / "student")
    return {
        "gradient_norm": [entry["student_gradient_norm"] for entry in entries],
        "derivative": [entry["derivative_norm"] for entry in entries],
        "flow_loss": log_of(folder / "flow")[-1]["loss"],
        "skipped": entries[-1]["skipped"],
    }


def plot(document: dict[str, Any], path: Path) -> None:
    """The norms of all teachers, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, result in document["gradients"].items():
        for panel, key in zip(panels, ("gradient_norm", "derivative"), strict=True):
            panel.semilogy(result[key], label=name, linewidth=1)
    panels[0].set_title("norm of the student's gradient")
    panels[1].set_title("norm of cos t sin t dF/dt")
    for panel in panels:
        panel.set_xlabel("step")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("students", "gradients"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="of each student or teacher (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="compile nothing, which a few steps are not worth")
    parser.add_argument("--captions", type=int, default=300, help="that a student is judged by (%(default)s)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=embedded_checkpoint(),
        help="has the text encoder and the autoencoder of RUN (the embedded one)",
    )
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/ablations.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/gradients.png"))
    options = parser.parse_args()
    data = ShapesTraining(options.run, RECIPE).flow_data()
    document = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    document["machine"] = describe(CPU)
    variants, measure = {
        "students": (STUDENTS, measure_student),
        "gradients": (TEACHERS, measure_gradients),
    }[options.what]
    results = document.setdefault(options.what, {})
    for name, change in tqdm(variants.items(), desc=options.what, unit="variant"):
        if results.get(name, {}).get("steps") != options.steps:
            # Or the later variants would run uncompiled: code that was compiled eight times is not compiled again.
            torch.compiler.reset()
            results[name] = {"steps": options.steps, **measure(data, name, change, options)}
            options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.what == "gradients":
        plot(document, options.plot)


if __name__ == "__main__":
    main()
