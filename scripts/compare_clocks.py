"""A flow transformer drawn by three solvers in as many steps: the paper's Table 1 on the shapes world.

python scripts/compare_clocks.py runs/shapes/guidance/transformer --output docs/benchmarks/clocks.json

- flow: Euler's method in flow time, from 1 to 0;
- trigflow: Euler's method in the angle, from π/2 to 0, of the same network seen through `trigflow/bridge.py`;
- trigflow, same points: rotations in the angle by way of the very times of the first, where a straight step in flow
  time is a rotation: the same pictures, up to rounding.

Scores are the judge's, and the Fréchet distance to renderings, of the same captions and the same noise.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_sprint import SanaSprintPipeline, SanaTransformer2DModel, embedded_checkpoint
from sana_sprint.evaluation.features import AutoencoderFeatures
from sana_sprint.evaluation.shapes import DistanceToRenderings, held_out_captions
from sana_sprint.shapes.judge import score
from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.training.flow import predict_velocity
from sana_sprint.trigflow.bridge import angle_of_flow_time, trigflow_velocity
from sana_sprint.trigflow.path import add_noise, predict_clean

# Latents (B, C, h, w) and times (B,) to flow velocities.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def flow_euler(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    latents = noise
    for now, then in pairwise(torch.linspace(1, 0, steps + 1)):
        latents = latents + (then - now) * velocity(latents, now.expand(len(noise)))
    return latents


def trigflow_euler(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    sample = noise
    for now, then in pairwise(torch.linspace(math.pi / 2, 0, steps + 1)):
        sample = sample + (then - now) * trigflow_velocity(velocity, sample, now.expand(len(noise)), sigma_data=1.0)
    return sample


def trigflow_rotations(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    sample = noise
    for now, then in pairwise(angle_of_flow_time(torch.linspace(1, 0, steps + 1))):
        angle = now.expand(len(noise))
        direction = trigflow_velocity(velocity, sample, angle, sigma_data=1.0)
        towards_noise = predict_clean(direction, -sample, angle)
        sample = add_noise(predict_clean(sample, direction, angle), towards_noise, then.expand(len(noise)))
    return sample


SOLVERS = {"flow": flow_euler, "trigflow": trigflow_euler, "trigflow, same points": trigflow_rotations}


@torch.no_grad()
def compare(folder: Path, steps: int, num_captions: int, guidance: float) -> dict[str, Any]:
    pipe = SanaSprintPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=torch.float32)
    transformer = SanaTransformer2DModel.from_pretrained(folder).eval()
    held_out = held_out_captions(num_captions, seed=2025)
    distance = DistanceToRenderings(held_out, AutoencoderFeatures(pipe.vae, torch.device("cpu")))
    cells, channels = transformer.config.sample_size, transformer.config.in_channels

    def drawn(solver: Callable[[Velocity, torch.Tensor, int], torch.Tensor]) -> list[np.ndarray]:
        def draw(captions: Sequence[str], before: int) -> Sequence[np.ndarray]:
            text, mask = pipe.encode_prompt(list(captions), complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION)
            generators = [torch.Generator().manual_seed(2025 + before + place) for place in range(len(captions))]
            noise = torch.stack([torch.randn(channels, cells, cells, generator=one) for one in generators])
            scale = torch.full((len(noise),), guidance)
            latents = solver(
                lambda sample, time: predict_velocity(transformer, sample, time, text, mask, scale), noise, steps
            )
            images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
            return list(((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())

        return held_out.drawn(draw, batch_size=50)

    results: dict[str, Any] = {}
    first: np.ndarray | None = None
    for name, solver in SOLVERS.items():
        pictures = drawn(solver)
        stacked = np.stack(pictures).astype(np.int64)
        first = stacked if first is None else first
        results[name] = {
            "overall": round(score(pictures, held_out.requests)["overall"], 4),
            "frechet": round(distance(pictures), 4),
            "share of values that differ from flow's by more than 1 of 255": float((abs(stacked - first) > 1).mean()),
            "mean difference from flow's, of 255": round(float(abs(stacked - first).mean()), 4),
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transformer", type=Path, help="folder of a flow transformer that embeds its guidance")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-captions", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--output", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    settings = {"steps": options.steps, "num_captions": options.num_captions, "guidance": options.guidance}
    results = compare(options.transformer, **settings)
    if options.output:
        options.output.write_text(json.dumps({**settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
