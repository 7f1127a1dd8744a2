"""A model's name and how it shall draw, as options, to its pictures of held-out captions of the shapes world."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.cli.arguments import QUANTIZATIONS, number, whole_number
from sana_sprint.cli.model import DTYPES, EMBEDDED

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from sana_sprint.cli.model import Model, Pipeline
    from sana_sprint.evaluation.shapes import DistanceToRenderings, HeldOutCaptions

# Of the options below; None stands for them there, so that an option that was given is told from one that was not.
DEFAULTS = {"model": EMBEDDED, "guidance": 4.5, "seed": 2025, "dtype": "auto", "quantization": None}


def add_arguments(group: argparse._ActionsContainer, num_captions: int) -> None:
    """Declares the options, all but the device; `num_captions` is the default of the one of that name."""
    group.add_argument("--model", metavar="MODEL", help=f"a pipeline folder or hub id ({EMBEDDED})")
    group.add_argument("--num-captions", type=whole_number(6), metavar="N", help=f"captions ({num_captions})")
    group.add_argument("--guidance", type=number, metavar="X", help=f"guidance scale ({DEFAULTS['guidance']})")
    group.add_argument(
        "--seed", type=whole_number(0), metavar="N", help=f"of captions and pictures ({DEFAULTS['seed']})"
    )
    group.add_argument("--dtype", choices=DTYPES, help=f"number format ({DEFAULTS['dtype']})")
    group.add_argument("--quantization", choices=QUANTIZATIONS, help="bits of the weights (the model's)")


def fill_in(options: argparse.Namespace, **defaults: Any) -> None:
    """Gives those options that were left out their defaults."""
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


@dataclass(frozen=True)
class Artist:
    """A model, loaded, that draws held-out captions as the options say."""

    model: "Model"
    pipe: "Pipeline"
    options: argparse.Namespace
    held_out: "HeldOutCaptions"

    def draw(self, title: str, **timetable: Any) -> "list[np.ndarray]":
        """A picture of each caption, with a bar of this title; `timetable` is steps or timesteps for the pipeline."""
        with bar(title, len(self.held_out.captions)) as progress:

            def draw_batch(captions: Sequence[str], num_drawn: int) -> "list[np.ndarray]":
                pictures = self.draw_batch(self.pipe, captions, num_drawn, **timetable)
                progress.update(len(pictures))
                return pictures

            return self.held_out.drawn(draw_batch)

    def draw_batch(
        self, pipe: "Pipeline", captions: Sequence[str], num_drawn: int, **arguments: Any
    ) -> "list[np.ndarray]":
        """Pictures (H, W, 3) uint8 of captions, by a pipeline of the model, after so many others."""
        import numpy as np
        import torch

        # A generator for each picture: the score does not depend on how captions fall into batches.
        seeds = range(self.options.seed + num_drawn, self.options.seed + num_drawn + len(captions))
        images, *_ = pipe(
            prompt=list(captions),
            **arguments,
            guidance_scale=self.options.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            return_dict=False,
        )
        return [np.asarray(image) for image in images]

    def distance(self) -> "DistanceToRenderings":
        """The Fréchet distance of its pictures to renderings, in the eyes of its own autoencoder."""
        from sana_sprint.evaluation.features import AutoencoderFeatures
        from sana_sprint.evaluation.shapes import DistanceToRenderings

        network = AutoencoderFeatures(self.pipe.vae, self.pipe.device_of("vae"))
        warn_if_few(len(self.held_out.captions), network.num_features)
        return DistanceToRenderings(self.held_out, network)

    def settings(self) -> dict[str, Any]:
        """What its scores hold for, for a JSON document."""
        options = self.options
        return {
            "model": options.model,
            "fingerprint": self.model.fingerprint,
            "num_captions": options.num_captions,
            "guidance": options.guidance,
            "seed": options.seed,
            "quantization": options.quantization,
        }


def bar(title: str, total: int) -> "tqdm":
    """Of a number of pictures."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit="picture", disable=None, leave=False)


def open_artist(
    options: argparse.Namespace, kind: "type[Pipeline] | None" = None, controlnet: "Model | None" = None
) -> Artist:
    """Loads the model as a pipeline of a kind, with the captions to draw.

    The options are those above with defaults filled in, and the device.
    """
    from sana_sprint.cli.model import Fitting, choose_device, choose_dtype, find_model, load
    from sana_sprint.evaluation.shapes import HeldOutCaptions, held_out_captions

    model = find_model(options.model)
    device = choose_device(options.device)
    # A ControlNet is shown scenes instead.
    held_out = HeldOutCaptions((), ()) if controlnet else held_out_captions(options.num_captions, options.seed)
    fitting = Fitting(options.quantization)
    pipe = load(model, device, choose_dtype(options.dtype, device), fitting, False, kind, controlnet)
    return Artist(model, pipe, options, held_out)


def warn_if_few(num_pictures: int, num_features: int) -> None:
    """Says where a Fréchet distance is mostly the noise of a small sample."""
    if num_pictures <= num_features:
        screen.report(
            "warning",
            f"{num_pictures} pictures are few for {num_features} features: this Fréchet distance can be compared with "
            "those of equally many pictures only",
        )
