"""What is measured: each case is a name, the networks it runs, and how a pair of pipelines becomes two runs.

B pictures, L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sana_sprint.bench.twins import Pair
from sana_sprint.memory.stages import Workload
from sana_sprint.pipelines.text_to_image import DEFAULT_INSTRUCTION
from sana_sprint.shapes.palette import SHAPE_COLOURS
from sana_sprint.text.encoder import drop_padding

_COLOURS = tuple(SHAPE_COLOURS)
_TIME, _GUIDANCE = 0.6, 0.45  # any angle, and the pipeline's guidance of 4.5 as it is scaled for the network

Run = Callable[[int], Any]


class Runs(NamedTuple):
    """A case on two pipelines.

    Attributes:
        ours, theirs: do it once, and return what came out. The argument is the number of the round: the same number
            asks both for the same, another number for what has not been asked for before. theirs is None for what
            diffusers does not have.
        numbers: a result to the tensor that is compared.
    """

    ours: Run
    theirs: Run | None
    numbers: Callable[[Any], torch.Tensor] = lambda result: result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        name: as reports show it.
        group: as it is asked for, with others of its kind.
        networks: those that it runs.
        build: pipelines with these networks, a workload and a seed to the two runs.
        steps: of each picture; None for what is no picture.
    """

    name: str
    group: str
    networks: tuple[str, ...]
    build: Callable[[Pair, Workload, int], Runs]
    steps: int | None = None

    @property
    def has_size(self) -> bool:
        """Whether the size of the pictures makes a difference."""
        return self.networks != ("text_encoder",)

    @property
    def has_model(self) -> bool:
        """Whether the model makes a difference: text encoder and autoencoder are the same in all of them."""
        return "transformer" in self.networks


def prompts(count: int, number: int) -> list[str]:
    """So many prompts, others for each number up to 4096 / count, and of the same lengths for all numbers.

    Every other one is shorter, as prompts of a batch differ in length.
    """
    texts = []
    for position in range(count):
        index = number * count + position
        first, second, third, fourth = (_COLOURS[index // len(_COLOURS) ** digit % len(_COLOURS)] for digit in range(4))
        ending = "" if position % 2 else ", with a small star below them"
        texts.append(f"a {first} circle left of a {second} square on {third} above a {fourth} triangle{ending}")
    return texts


def _tensor(pipe: Any, size: Workload, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(pipe.device, size.dtype)


def _text(is_new: bool) -> Callable[[Pair, Workload, int], Runs]:
    def build(pair: Pair, size: Workload, seed: int) -> Runs:
        def run(pipe: Any) -> Run:
            return lambda number: pipe.encode_prompt(
                prompts(size.batch_size, number if is_new else 0),
                max_sequence_length=size.max_sequence_length,
                complex_human_instruction=DEFAULT_INSTRUCTION,
            )

        # Where the mask is 0 the embeddings mean nothing.
        return Runs(run(pair.ours), run(pair.theirs), lambda result: result[0] * result[1][:, :, None])

    return build


def _step(pair: Pair, size: Workload, seed: int) -> Runs:
    ours, theirs = pair.ours.transformer, pair.theirs.transformer
    batch, config = size.batch_size, ours.config
    cell = pair.ours.vae_scale_factor
    shape = (batch, config.in_channels, size.height // cell, size.width // cell)
    embeds = _tensor(pair.ours, size, (batch, size.max_sequence_length, config.caption_channels), seed)
    lengths = torch.tensor([20 - 5 * (index % 2) for index in range(batch)])[:, None]
    mask = (torch.arange(size.max_sequence_length) < lengths).long().to(embeds.device)  # B L

    def run(network: Any, embeds: torch.Tensor, mask: torch.Tensor | None) -> Run:
        inputs = {
            "hidden_states": _tensor(pair.ours, size, shape, seed + 1),
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "timestep": embeds.new_full((batch,), _TIME),
            "guidance": embeds.new_full((batch,), _GUIDANCE),
        }
        return lambda number: network(**inputs, return_dict=False)[0]

    # Each as its pipeline calls it: ours drops the padding, once for all steps.
    return Runs(run(ours, *drop_padding(embeds, mask)), run(theirs, embeds, mask))


def _decode(pair: Pair, size: Workload, seed: int) -> Runs:
    config, cell = pair.ours.vae.config, pair.ours.vae_scale_factor
    shape = (size.batch_size, config.latent_channels, size.height // cell, size.width // cell)
    latents = _tensor(pair.ours, size, shape, seed) / config.scaling_factor

    def run(vae: Any) -> Run:
        return lambda number: vae.decode(latents, return_dict=False)[0]

    return Runs(run(pair.ours.vae), run(pair.theirs.vae))


def _picture(steps: int) -> Callable[[Pair, Workload, int], Runs]:
    def build(pair: Pair, size: Workload, seed: int) -> Runs:
        def run(pipe: Any) -> Run:
            return lambda number: (
                pipe(
                    prompts(size.batch_size, number),
                    num_inference_steps=steps,
                    # diffusers' defaults, which fit two steps alone; without the second, angles are spaced evenly.
                    max_timesteps=1.57080,
                    intermediate_timesteps=1.3 if steps == 2 else None,
                    height=size.height,
                    width=size.width,
                    generator=torch.Generator(pipe.device).manual_seed(seed + number),
                    max_sequence_length=size.max_sequence_length,
                    use_resolution_binning=False,
                    output_type="pt",
                ).images
            )

        # From [0, 1] to the scale of the network: about zero, where an error is not lost in the mean.
        return Runs(run(pair.ours), run(pair.theirs), lambda images: 2 * images - 1)

    return build


CASES = (
    Case(name="text, new prompt", group="text", networks=("text_encoder",), build=_text(is_new=True)),
    Case(name="text, same prompt", group="text", networks=("text_encoder",), build=_text(is_new=False)),
    Case(name="step", group="step", networks=("transformer",), build=_step),
    Case(name="decode", group="decode", networks=("vae",), build=_decode),
    *(
        Case(
            name=f"picture, {steps} step{'s' if steps > 1 else ''}",
            group="picture",
            networks=("text_encoder", "transformer", "vae"),
            build=_picture(steps),
            steps=steps,
        )
        for steps in (1, 2, 4)
    ),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
