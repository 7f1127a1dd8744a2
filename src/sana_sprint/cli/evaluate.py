"""`sana-sprint evaluate`: a model in; its score on held-out captions of the shapes world, per category, out."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import QUANTIZATIONS, whole_number
from sana_sprint.cli.model import DTYPES, EMBEDDED, FLOW_STEPS, SPRINT_STEPS

if TYPE_CHECKING:
    import numpy as np

    from sana_sprint import SanaSprintPipeline

_NUM_CAPTIONS, _SEED, _GUIDANCE = 500, 2025, 4.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", default=EMBEDDED, metavar="MODEL", help="a pipeline folder or hub id (%(default)s)")
    parser.add_argument(
        "--num-captions", type=whole_number(6), default=_NUM_CAPTIONS, metavar="N", help="captions (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=whole_number(1), metavar="N", help=f"steps ({SPRINT_STEPS}, and {FLOW_STEPS} for a flow model)"
    )
    parser.add_argument("--guidance", type=float, default=_GUIDANCE, metavar="X", help="guidance scale (%(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=_SEED, metavar="N", help="of captions and pictures")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="number format (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, .. (%(default)s)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="bits of the weights (the model's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    parser.set_defaults(run=run)


def _draw(
    pipe: "SanaSprintPipeline", captions: Sequence[str], num_drawn: int, options: argparse.Namespace, steps: int
) -> "list[np.ndarray]":
    import numpy as np
    import torch

    # A generator for each picture: the score does not depend on how captions fall into batches.
    seeds = range(options.seed + num_drawn, options.seed + num_drawn + len(captions))
    images, *_ = pipe(
        prompt=list(captions),
        num_inference_steps=steps,
        guidance_scale=options.guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        return_dict=False,
    )
    return [np.asarray(image) for image in images]


def run(options: argparse.Namespace) -> None:
    """Draws held-out captions, has them judged, and prints the scores."""
    from tqdm import tqdm

    from sana_sprint.cli.model import Fitting, choose_device, choose_dtype, find_model, load, own_steps

    with screen.quiet_libraries():
        from sana_sprint.evaluation.shapes import score_drawing

        model = find_model(options.model)
        device = choose_device(options.device)
        fitting = Fitting(options.quantization)
        pipe = load(model, device, choose_dtype(options.dtype, device), fitting, show_progress=False)
        steps = options.steps or own_steps(pipe)
        with tqdm(total=options.num_captions, desc="drawing", unit="picture", disable=None, leave=False) as bar:

            def draw(captions: Sequence[str], num_drawn: int) -> "list[np.ndarray]":
                pictures = _draw(pipe, captions, num_drawn, options, steps)
                bar.update(len(pictures))
                return pictures

            scores = score_drawing(draw, options.num_captions, options.seed)
    document: dict[str, Any] = {
        "model": options.model,
        "fingerprint": model.fingerprint,
        "num_captions": options.num_captions,
        "steps": steps,
        "guidance": options.guidance,
        "seed": options.seed,
        "quantization": options.quantization,
        "scores": {name: round(value, 4) for name, value in scores.items()},
    }
    if options.json:
        print(json.dumps(document, indent=2))
        return
    print(f"{options.num_captions} held-out captions, {steps} steps, guidance {options.guidance}")
    for name, value in scores.items():
        print(f"  {name.replace('_', ' '):20} {value:6.3f}")
