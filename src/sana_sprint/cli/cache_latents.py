"""`sana-sprint cache-latents`: pictures with captions and a model in; latents and text features for training out."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import CONTROLS, whole_number
from sana_sprint.cli.model import DTYPES

if TYPE_CHECKING:
    import torch

    from sana_sprint.training.datasets.caching import CacheReport

_SHOWN = 10  # of the examples that were skipped


def shard(text: str) -> tuple[int, int]:
    """Part and number of parts from "0/4"."""
    part, _, parts = text.partition("/")
    if not (part.isascii() and part.isdecimal() and parts.isascii() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"wanted part/parts, from 0/4 to 3/4 for four, got {text!r}")
    return int(part), int(parts)


def launched_shard(environment: Mapping[str, str]) -> tuple[int, int]:
    """Part and number of parts as a launcher such as torchrun gives them; 0 of 1 without one."""
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .tar shard, or a folder of shards or pictures")
    parser.add_argument("--model", required=True, metavar="MODEL", help="a pipeline folder or hub id: whose encoders")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="the cache; a run that stopped goes on from what is there",
    )
    parser.add_argument(
        "--size",
        type=whole_number(1),
        default=1024,
        metavar="PIXELS",
        help="side of a square picture; others get the nearest shape that SANA has at 512, 1024, 2048 and 4096, and are"
        " square at every other size (%(default)s)",
    )
    parser.add_argument(
        "--captions-tokens", type=whole_number(2), default=300, metavar="N", help="length of captions (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=8, metavar="N", help="pictures at once (%(default)s)"
    )
    parser.add_argument(
        "--examples-per-shard", type=whole_number(1), default=500, metavar="N", help="of the cache (%(default)s)"
    )
    parser.add_argument(
        "--control",
        choices=CONTROLS,
        help="add latents of what a ControlNet is shown of each picture (none)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="number format of the networks (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, .. (%(default)s)")
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="make only part I, from 0, of N; a launcher's RANK and WORLD_SIZE do the same (0/1)",
    )
    parser.set_defaults(run=run)


def _own_device(asked: str) -> "torch.device":
    import torch

    from sana_sprint.cli.model import choose_device

    device = choose_device(asked)
    if asked == "auto" and device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # a launcher's processes share a machine
    return device


def _print_result(report: "CacheReport", options: argparse.Namespace, part: int, parts: int) -> None:
    for line in report.skipped.lines()[:_SHOWN]:
        screen.report("skipped", line)
    facts = [f"wrote {report.num_written} examples to {options.output}", f"skipped {len(report.skipped)}"]
    if report.skipped:
        from sana_sprint.training.datasets.cache_files import skipped_path

        facts[-1] += f" (listed in {skipped_path(options.output, part, parts).name})"
    if report.num_cut:
        facts.append(f"cut {report.num_cut} captions to {options.captions_tokens} tokens")
    if report.num_present:
        facts.append(f"{report.num_present} were there")
    print(", ".join(facts))


def run(options: argparse.Namespace) -> None:
    """Encodes what is not in the cache yet, and prints how much that was."""
    with screen.quiet_libraries():
        import diffusers
        import transformers

        from sana_sprint import SanaSprintPipeline
        from sana_sprint.cli.model import choose_dtype, find_model
        from sana_sprint.pipelines.images import resolution_bins
        from sana_sprint.training.datasets.caching import CacheSettings, cache_latents
        from sana_sprint.training.datasets.encoding import ExampleEncoder
        from sana_sprint.training.datasets.image_text import ImageTextDataset

        part, parts = options.shard or launched_shard(os.environ)
        bins = resolution_bins(options.size) or {"1.0": [options.size, options.size]}
        model, device = find_model(options.model), _own_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        dataset = ImageTextDataset(options.source, bins)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe = SanaSprintPipeline.from_pretrained(model.folder, transformer=None, torch_dtype=dtype).to(device)
        report = cache_latents(
            dataset,
            ExampleEncoder(
                vae=pipe.vae,
                tokenizer=pipe.tokenizer,
                text_encoder=pipe.text_encoder,
                device=device,
                dtype=dtype,
                captions_tokens=options.captions_tokens,
            ),
            options.output,
            CacheSettings(
                model=model.fingerprint,
                size=options.size,
                examples_per_shard=options.examples_per_shard,
                batch_size=options.batch_size,
                control=options.control,
                part=part,
                parts=parts,
            ),
        )
    _print_result(report, options, part, parts)
