"""What each idea behind the speed gives on its own: all of them in use, beside all but one, in turn.

python scripts/ablate_speed.py [--output docs/benchmarks/speed-ablation.json] [--quick]

Full-size 1.6B with random weights, as `sana-sprint bench` has it. An idea is undone by exchanging, in this process
alone, the piece of code that holds it for what one would write without it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from sana_sprint.autoencoder import inner, resample, strips
from sana_sprint.autoencoder.resample import DoublingConv2d, channels_to_space, nearest_double, repeat_channels
from sana_sprint.bench import cases
from sana_sprint.bench.cases import CASES, Case, Runs
from sana_sprint.bench.machine import describe
from sana_sprint.bench.measure import measure
from sana_sprint.bench.spread import ratios, spread
from sana_sprint.bench.twins import QUICK, Pair, Twins, configs_of
from sana_sprint.layers import norms
from sana_sprint.memory.stages import Workload
from sana_sprint.sizes import readable_bytes

Undone = Callable[[Any], AbstractContextManager[Any]]  # our pipeline to where an idea is not in use


class Idea(NamedTuple):
    """An idea, the case of `bench.cases` that it is for, how it is undone, and the side of the pictures in pixels."""

    name: str
    case: str
    undone: Undone
    size: int = 512


@contextmanager
def forgetful(pipe: Any) -> Iterator[None]:
    pipe.text_cache.clear()
    yield


@contextmanager
def channels_first(pipe: Any) -> Iterator[None]:
    """Every convolution of the decoder gets an image whose channels are apart in memory, and gives one."""

    def rearrange(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].contiguous(), *inputs[1:]

    with ExitStack() as stack:
        for module in pipe.vae.decoder.modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_pre_hook(rearrange).remove)
        yield


def convolve_double(self: DoublingConv2d, x: torch.Tensor, inner: bool = False, doubled: bool = False) -> torch.Tensor:
    return super(DoublingConv2d, self).forward(nearest_double(x, inner) if doubled else x, inner)


def repeat_and_shuffle(x: torch.Tensor, channels: int) -> torch.Tensor:
    image = channels_to_space(repeat_channels(x, channels * resample.FACTOR**2))
    return image.movedim(1, -1).unflatten(2, (-1, resample.FACTOR)).unflatten(1, (-1, resample.FACTOR))


def exchange(owner: Any, name: str, value: Any) -> Undone:
    return lambda pipe: patch.object(owner, name, value)


IDEAS = (
    Idea("the instruction is read once", "text, new prompt", forgetful),
    Idea("and padding is not read", "text, new prompt", lambda pipe: patch.object(pipe, "text_cache", None)),
    Idea(
        "padding is not attended to", "step", exchange(cases, "drop_padding", lambda embeds, mask: (embeds, mask)), 1024
    ),
    Idea("memory is channels-last", "decode", channels_first),
    Idea("the double of an image is not made", "decode", exchange(DoublingConv2d, "forward", convolve_double)),
    Idea("convolutions by Winograd", "decode", exchange(inner, "winograd_pays", lambda *arguments: False), 1024),
    Idea("norms run piece by piece", "decode", exchange(norms, "MAX_NUMBERS_AT_ONCE", sys.maxsize)),
    Idea("shortcuts are views", "decode", exchange(resample, "repeat_into_space", repeat_and_shuffle)),
    Idea("strips", "decode", lambda pipe: patch.object(pipe.vae, "use_strips", False), 1024),
    Idea("strips leave out rows", "decode", exchange(strips, "LEAVES_OUT", ())),
)


def runs_of(idea: Idea, case: Case, pair: Pair, size: Workload, seed: int) -> Runs:
    """With the idea, and without."""
    with_it = case.build(pair, size, seed)
    with idea.undone(pair.ours):
        without = case.build(pair, size, seed)

    def run(number: int) -> Any:
        with idea.undone(pair.ours):
            return without.ours(number)

    return Runs(with_it.ours, run, with_it.numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it work?")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs = configs_of(QUICK if options.quick else "1.6b")
    twins = Twins(configs=configs, dtype=torch.bfloat16, device=device, seed=options.seed)
    rows = []
    print("| idea | case | size | without it | with it | times faster with it | memory, with it : without | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for idea in IDEAS:
        (case,) = (case for case in CASES if case.name == idea.case)
        runs = runs_of(idea, case, twins.pair(case.networks), Workload(height=idea.size, width=idea.size), options.seed)
        measured = measure(runs, options.rounds, device)
        with_it, without = measured.ours, measured.theirs
        assert without is not None
        assert measured.agreement is not None
        times = spread(ratios(without.seconds, with_it.seconds))
        seconds = [f"{spread(one.seconds).median:.3g} s" for one in (without, with_it)]
        memory = " : ".join(readable_bytes(one.counts.peak_bytes or 0) for one in (with_it, without))
        faster = f"{times.median:.2f} ({times.lower:.2f}, {times.upper:.2f})"
        error = measured.agreement.relative_error
        cells = [idea.name, idea.case, str(idea.size), *seconds, faster, memory, f"{error:.1e}"]
        print("|", " | ".join(cells), "|", flush=True)
        both = {"with": with_it, "without": without}
        rows.append(
            {
                "idea": idea.name,
                "case": idea.case,
                "size": idea.size,
                "seconds": {name: one.seconds for name, one in both.items()},
                "peak_bytes": {name: one.counts.peak_bytes for name, one in both.items()},
                "times_faster": times._asdict(),
                "relative_error": error,
            }
        )
    if options.output:
        record = {"machine": describe(device), "dtype": "bfloat16", "rounds": options.rounds, "rows": rows}
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
