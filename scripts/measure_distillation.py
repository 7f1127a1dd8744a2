"""What a step of distillation costs, beside the published way of computing it: same networks, same batch, one run.

python scripts/measure_distillation.py [--output docs/benchmarks/distillation.json] [--compile]

The published way (NVlabs' trainer, and diffusers' example after it) runs the student three times for a step of the
student: once for the derivative, once for the value with its graph, once for what the discriminator sees; then once
more, and on another batch, for a step of the discriminator. `Distillation` runs it once for all of them. Peaks are of
the resident memory of a process of its own, so only Linux has them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from measure_memory import status
from sana_sprint.assets import embedded_checkpoint
from sana_sprint.bench.machine import describe
from sana_sprint.training.adversarial import discriminator_loss, frozen, generator_loss
from sana_sprint.training.datasets.source import LatentBatch
from sana_sprint.training.distillation import Distillation
from sana_sprint.training.draws import Draws
from sana_sprint.training.flow import FlowData
from sana_sprint.training.recipes.shapes import RECIPE
from sana_sprint.transformer.model import SanaTransformer2DModel
from sana_sprint.trigflow.consistency import consistency_loss, consistency_tangent
from sana_sprint.trigflow.path import add_noise, predict_clean

BATCH, TOKENS, STEPS, WARMUP = 64, 16, 7, 3
# The paper's two losses at once, for the shapes transformer.
SCM_AND_LADD = replace(RECIPE.consistency, max_time_share=0.5, tangent_warmup_steps=0, adversarial_weight=1.0)


def objective(compiled: bool) -> Distillation:
    """The distillation of the embedded transformer, on random latents and captions of 16 tokens."""
    folder = embedded_checkpoint() / "transformer"
    teacher = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    size, width = teacher.config.sample_size, teacher.config.caption_channels
    latents = torch.randn(4 * BATCH, teacher.config.in_channels, size, size)
    captions = torch.randn(4 * BATCH + 1, TOKENS, width).bfloat16()
    data = FlowData(latents, captions, torch.ones(4 * BATCH + 1, TOKENS, dtype=torch.long))
    return Distillation(teacher, data, replace(SCM_AND_LADD, compile=compiled)).train()


class PublishedWay(nn.Module):
    """The same losses of the same networks, computed as NVlabs' trainer does: a step of each network in turn."""

    def __init__(self, ours: Distillation) -> None:
        super().__init__()
        self.ours = ours
        self.student = partial(ours._velocity, ours.student)
        self.derivative = torch.compile(self._derivative) if ours.settings.compile else self._derivative

    @torch.no_grad()
    def _derivative(
        self,
        sample: torch.Tensor,
        angle: torch.Tensor,
        batch: LatentBatch,
        guidance: torch.Tensor,
        teacher_velocity: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        factor = torch.cos(angle) * torch.sin(angle)
        return torch.func.jvp(
            lambda sample, angle: self.ours._predict(self.ours.student, sample, angle, batch, guidance),
            (sample, angle),
            (factor.view(-1, 1, 1, 1) * teacher_velocity, factor),
        )

    def student_step(self, draws: Draws) -> torch.Tensor:
        ours, settings = self.ours, self.ours.settings
        batch = ours.data.batch(draws)
        guidance = draws.choice(settings.guidance_scales)
        angle = settings.student_angles.draw(draws, settings.sigma_data)
        sample = add_noise(batch.clean, draws.normal(batch.clean.shape[1:]), angle)
        with torch.no_grad():
            teacher_velocity = ours._teacher_pass(sample, angle, batch, guidance)
            fixed, derivative = self.derivative(sample, angle, batch, guidance, teacher_velocity)
            tangent = consistency_tangent(sample, angle, fixed, teacher_velocity, derivative, 1.0)
        assert ours.log_variance is not None
        loss = consistency_loss(
            self.student(sample, angle, batch, guidance), tangent, angle, ours.log_variance(angle)
        ).mean()

        again = settings.student_angles.draw(draws, settings.sigma_data)
        noisy = add_noise(batch.clean, draws.normal(batch.clean.shape[1:]), again)
        fake = predict_clean(noisy, self.student(noisy, again, batch, guidance), again)
        assert ours.discriminator is not None
        with frozen(ours.discriminator):
            logits = ours.discriminator(ours._noised_features(draws, fake, batch.caption, batch.mask))
        return loss + settings.adversarial_weight * generator_loss(logits)

    def discriminator_step(self, draws: Draws) -> torch.Tensor:
        ours, settings = self.ours, self.ours.settings
        batch = ours.data.batch(draws, misaligned=True)
        guidance = draws.choice(settings.guidance_scales)
        angle = settings.student_angles.draw(draws, settings.sigma_data)
        noisy = add_noise(batch.clean, draws.normal(batch.clean.shape[1:]), angle)
        assert ours.discriminator is not None
        assert batch.wrong_caption is not None
        assert batch.wrong_mask is not None
        with torch.no_grad():
            fake = predict_clean(noisy, self.student(noisy, angle, batch, guidance), angle)
            fakes = ours._noised_features(draws, fake, batch.caption, batch.mask)
            wrong = ours._noised_features(draws, batch.clean, batch.wrong_caption, batch.wrong_mask)
            real = ours._noised_features(draws, batch.clean, batch.caption, batch.mask)
        logits = torch.cat([ours.discriminator(fakes), ours.discriminator(wrong)])
        return discriminator_loss(ours.discriminator(real), logits)

    def step(self, draws: Draws) -> None:
        for loss in (self.student_step, self.discriminator_step):
            loss(draws).backward()


def step_of_ours(ours: Distillation, draws: Draws) -> None:
    ours(draws)["loss"].backward()


def measure(case: str) -> dict[str, Any]:
    """Seconds of the steps after those that warm up, and the peak of the process."""
    torch.manual_seed(0)
    ours = objective(compiled=case.endswith("compiled"))
    published = PublishedWay(ours)
    seconds = []
    for index in range(STEPS + WARMUP):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            draws = Draws.of_step(0, index, BATCH)
            if case.startswith("published"):
                published.step(draws)
            else:
                step_of_ours(ours, draws)
        seconds.append(time.perf_counter() - started)
        ours.zero_grad()
    kept = seconds[WARMUP:]
    return {"median": statistics.median(kept), "least": min(kept), "most": max(kept), "peak": status("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/distillation.json"))
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is measured, in turn (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="measure both compiled as well; takes minutes a round")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    forms = ["", ", compiled"] if options.compile else [""]
    cases = [f"{way}{form}" for form in forms for way in ("published", "ours")]
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            command = [sys.executable, __file__, "--case", case]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[case].append(json.loads(done.stdout.splitlines()[-1]))
            print(case, results[case][-1], flush=True)
    medians = {case: statistics.median(result["median"] for result in each) for case, each in results.items()}
    document = {
        "machine": describe(torch.device("cpu")),
        "batch": BATCH,
        "seconds a step": medians,
        "peak bytes": {case: max(result["peak"] for result in each) for case, each in results.items()},
        "times faster": {
            form.strip(", ") or "eager": medians[f"published{form}"] / medians[f"ours{form}"] for form in forms
        },
        "rounds": results,
    }
    options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document["times faster"]))


if __name__ == "__main__":
    main()
