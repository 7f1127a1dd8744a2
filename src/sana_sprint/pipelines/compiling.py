"""A pipeline to the same pipeline with compiled networks, warmed up for the calls that are to come."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import count, pairwise, product
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sana_sprint.pipelines.base import SprintPipeline
from sana_sprint.pipelines.checks import check_choice, whole_number
from sana_sprint.pipelines.scales import weight_bits
from sana_sprint.quantisation.float8 import check_float8, quantise_to_float8
from sana_sprint.text.cache import Reading
from sana_sprint.text.prefix import Reader, read_behind
from sana_sprint.transformer.multi_control import SanaMultiControlNetModel

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline", bound=SprintPipeline)

# Of torch.compile, and what is left of them without CUDA graphs. Other devices have none, and the blocks of a network
# cannot have them: what one graph returns is gone when the next one runs, and so cannot be what that one is given.
MODES = {
    "default": "default",
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
    "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
}
# Most prompts, long ones, and all 300 tokens that a prompt may have by default: kernels prefer multiples of 8.
TEXT_LENGTHS = (64, 128, 304)
MAX_SEQUENCE_LENGTH = 300
# Arguments of calls without which there is nothing to draw.
PICTURES = ("image", "mask_image", "control_image")
# Arguments of calls that the warm-up chooses itself.
CHOSEN = (
    "prompt",
    "prompt_embeds",
    "prompt_attention_mask",
    "height",
    "width",
    "num_inference_steps",
    "generator",
    "output_type",
)
# CUDA graphs are prepared in a first run, recorded in a second and used in a third.
DRAWS_WITH_GRAPHS = 3


@dataclass(frozen=True)
class Settings:
    """How networks are compiled."""

    mode: str
    regional: bool
    backend: str | Callable[..., Any]
    float8: bool

    def options(self, device: torch.device, is_whole: bool = True) -> dict[str, Any]:
        """What to tell torch.compile about a network on a device, or about a part of one."""
        mode = self.mode if device.type == "cuda" and is_whole else MODES[self.mode]
        # Sizes are few and known, so code is made for each of them, which CUDA graphs need anyway.
        return {"mode": mode, "backend": self.backend, "dynamic": False}


_compiled: WeakKeyDictionary[nn.Module, Settings] = WeakKeyDictionary()


@cache
def _compiled_reader(backend: str | Callable[..., Any], mode: str, dynamic: bool) -> Reader:
    return torch.compile(read_behind, backend=backend, mode=mode, dynamic=dynamic)


def _networks(pipe: SprintPipeline) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _parts(pipe: SprintPipeline) -> dict[str, Any]:
    """What is compiled in place, by the name that messages use."""
    decoder = None if pipe.vae is None else pipe.vae.decoder
    parts = {"transformer": pipe.transformer, "vae.decoder": decoder}
    controlnet = pipe.components.get("controlnet")
    if isinstance(controlnet, SanaMultiControlNetModel):
        parts |= {f"controlnet.nets.{number}": net for number, net in enumerate(controlnet.nets)}
    else:
        parts["controlnet"] = controlnet
    return {name: part for name, part in parts.items() if part is not None}


def _has_regions(part: nn.Module) -> bool:
    return bool(getattr(part, "_repeated_blocks", None))


def _obstacles(pipe: SprintPipeline, settings: Settings) -> Iterator[str]:
    """Everything about a pipeline that compiled code cannot cope with."""
    for name in ("transformer", "controlnet"):
        if name in pipe.components and pipe.components[name] is None:
            yield f"it has no {name}"
    if isinstance(pipe.hf_device_map, Mapping) and len({*pipe.hf_device_map.values()}) > 1:
        yield "a device_map has put it on several devices (reset_device_map(), then to() moves it to one)"
    if pipe.vae is not None and pipe.vae.use_slicing:
        yield "its vae decodes pictures one by one (disable_vae_slicing())"
    for name, network in _networks(pipe).items():
        if weight_bits(network) is not None:
            yield f"{name} has weights of {weight_bits(network)} bits by bitsandbytes (load it in 16 bits)"
        is_in_groups = pipe._maybe_raise_error_if_group_offload_active(module=network)
        if is_in_groups or any(hasattr(module, "_hf_hook") for module in network.modules()):
            yield f"{name} is offloaded (leave its weights on the device)"
    for name, part in _parts(pipe).items():
        if settings.regional and name != "vae.decoder" and not _has_regions(part):
            yield f"{name} is of diffusers' class, which has no block to compile alone (regional=False)"
        if settings.float8 and name == "transformer" and part not in _compiled:
            if getattr(part, "peft_config", None):
                yield f"{name} has adapters, which would be rounded too (fuse_lora(), then unload_lora_weights())"
            if any(hasattr(weight, "__tensor_flatten__") for weight in part.parameters()):
                yield f"{name} is quantised already (load it in 16 bits, or leave float8 out)"
        if _compiled.get(part, settings) != settings:
            yield f"{name} is compiled already, with {_compiled[part]} (load it anew)"


def _check_call(pipe: SprintPipeline, call: Mapping[str, Any]) -> None:
    """Refuses to warm up a pipeline with arguments that its calls do not have, or without the pictures they need."""
    parameters = signature(pipe.__call__).parameters
    unknown = [name for name in call if name not in parameters]
    if unknown:
        raise ValueError(f"calls of {type(pipe).__name__} have no {' or '.join(unknown)}")
    chosen = [name for name in call if name in CHOSEN]
    if chosen:
        raise ValueError(
            f"the warm-up chooses {' and '.join(chosen)} itself: say sizes, batch_sizes, steps and text_lengths"
        )
    missing = [name for name in PICTURES if name in parameters and call.get(name) is None]
    if missing:
        raise ValueError(
            f"{type(pipe).__name__} is warmed up with pictures like those to come: pass {' and '.join(missing)}"
        )


def _check_lengths(text_lengths: Sequence[int]) -> tuple[int, ...]:
    lengths = tuple(whole_number("text_lengths", length) for length in text_lengths)
    if not lengths or any(first >= second for first, second in pairwise(lengths)):
        raise ValueError(f"text_lengths must be one length or several, ascending, got {tuple(text_lengths)}")
    return lengths


def _compile_networks(pipe: SprintPipeline, settings: Settings) -> None:
    for name, network in _networks(pipe).items():
        if name != "text_encoder":  # without convolutions
            network.to(memory_format=torch.channels_last)
    for name, part in _parts(pipe).items():
        if part in _compiled:
            logger.info("%s is compiled already", name)
            continue
        if settings.float8 and name == "transformer":
            quantise_to_float8(part)
            logger.info("%s: products in float8, which are rounded", name)
        is_whole = not (settings.regional and _has_regions(part))
        options = settings.options(pipe.device_of(name.partition(".")[0]), is_whole)
        (part.compile if is_whole else part.compile_repeated_blocks)(**options)
        _compiled[part] = settings
        logger.info("%s: torch.compile of %s, %s", name, "the whole" if is_whole else "its blocks", options)


def _compile_text(pipe: SprintPipeline, settings: Settings, lengths: tuple[int, ...]) -> None:
    pipe.text_lengths = lengths
    if pipe.text_encoder is None or pipe.text_cache is None:
        logger.info("text: not compiled, for the pipeline has no text_encoder or no text_cache")
        return
    options = settings.options(pipe.device_of("text_encoder"))
    pipe.text_cache.clear()  # else it may know the prompts of the warm-up
    pipe.text_cache.reading = Reading(_compiled_reader(**options), lengths)
    logger.info("text behind an instruction: torch.compile of the text encoder, %s", options)


def _prompt(tokenizer: Any, length: int, number: int) -> str:
    """A prompt for each number, of which just so many tokens are kept, or one or two fewer."""
    # One for the instruction's last token, which is kept too.
    prompts = (" ".join([str(number), *["a"] * words]) for words in range(length, -1, -1))
    return next((prompt for prompt in prompts if len(tokenizer(prompt).input_ids) < length), "")


def _text(pipe: SprintPipeline, length: int, batch: int, number: int) -> dict[str, Any]:
    """The arguments of a call for texts of a length."""
    if pipe.text_encoder is not None:
        return {"prompt": [_prompt(pipe.tokenizer, length, number)] * batch}
    shape = (batch, length, pipe.transformer.config.caption_channels)
    embeds = torch.zeros(shape, dtype=pipe.transformer.dtype, device=pipe.device_of("transformer"))
    return {"prompt_embeds": embeds, "prompt_attention_mask": embeds.new_ones(shape[:2], dtype=torch.long)}


@contextmanager
def _warming_up(pipe: SprintPipeline) -> Iterator[None]:
    """Inside, nothing shows progress, and torch does not give up on a function after its eighth shape."""
    from torch._dynamo import config  # late, for it takes seconds to import

    progress = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**progress, "disable": True})
    try:
        with config.patch(recompile_limit=config.accumulated_recompile_limit):
            yield
    finally:
        pipe.set_progress_bar_config(**progress)


@contextmanager
def _checking(pipe: SprintPipeline) -> Iterator[None]:
    """Inside, a call ends where its arguments are checked."""
    pipe.__dict__["draw"] = pipe.check_inputs
    try:
        yield
    finally:
        del pipe.__dict__["draw"]


def _draw(
    pipe: Any,
    size: tuple[int | None, int | None],
    batch: int,
    length: int,
    num_steps: int,
    call: Mapping[str, Any],
    number: int = 0,
) -> None:
    """One call for a batch of texts of a length, which are other texts for another `number`."""
    height, width = size
    pipe(
        **_text(pipe, length, batch, number),
        height=height,
        width=width,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent" if pipe.vae is None else "pt",
        **call,
    )


def _warm_up(
    pipe: Any,
    sizes: Sequence[tuple[int | None, int | None]],
    batch_sizes: Sequence[int],
    steps: Sequence[int],
    draws: int,
    call: Mapping[str, Any],
) -> None:
    longest = call.get("max_sequence_length", MAX_SEQUENCE_LENGTH)
    lengths = dict.fromkeys(min(length, longest) for length in pipe.text_lengths)
    numbers = count()
    for size, batch, length, num_steps in product(sizes, batch_sizes, lengths, steps):
        began = time.perf_counter()
        for _ in range(draws):
            _draw(pipe, size, batch, length, num_steps, call, next(numbers))
        height, width = size
        logger.info(
            "warm-up: %s, batch %d, %d text tokens, %d steps: %.1f s",
            "native size" if height is None or width is None else f"{height}x{width} pixels",
            batch,
            length,
            num_steps,
            time.perf_counter() - began,
        )


def compile_pipeline(
    pipe: Pipeline,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    batch_sizes: Sequence[int] = (1,),
    steps: Sequence[int] = (1, 2, 4),
    text_lengths: Sequence[int] = TEXT_LENGTHS,
    mode: str = "reduce-overhead",
    regional: bool = False,
    float8: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    **call: Any,
) -> Pipeline:
    """Prepare a pipeline for calls of low latency; without float8 the pictures stay the same up to float rounding.

    Compiles the reading of prompts behind an instruction, the transformer, ControlNets and the decoder, puts weights of
    convolutions into channels-last memory, and draws once what is to be drawn later, so that no later call like it
    waits for a compiler. What is done is told to the logger of this module. A second call with the same settings
    compiles nothing that is compiled, and warms up for what it names.

    A call of a size or batch that was not named is compiled when it comes; torch gives up after eight shapes, and
    computes others as written. Compiled, the autoencoder decodes pictures as a whole, not in strips. CUDA graphs belong
    to the thread that this is called in, and return the same memory every time: clone what `pipe.transformer` and
    `pipe.vae.decode` return where you call them yourself.

    Args:
        pipe: On the device that it is to run on. Its networks are compiled in place, so pipelines that share them
            (`from_pipe`) have them compiled; each needs this call for its own text and warm-up.
        sizes: (height, width) in pixels, as calls will ask for them; None for the size that the model was trained on.
        batch_sizes: Numbers of prompts, of one picture each.
        steps: Numbers of steps. They share their code.
        text_lengths: Ascending numbers of tokens. Text is padded to the first of these that it fits into, with tokens
            that are masked, and prompts of all lengths up to it share their code.
        mode: Of torch.compile: "reduce-overhead" or "max-autotune" with CUDA graphs, "default" or
            "max-autotune-no-cudagraphs" without. There are no graphs outside of CUDA.
        regional: Compile the block of the transformer, and of ControlNets, once and not all of them as a whole: in a
            fraction of the time, for code without CUDA graphs.
        float8: Round the matrix products of the transformer's blocks to float8, in place, by torchao
            (`quantisation.float8`). This changes pictures; docs/speed.md says how far.
        backend: Of torch.compile.
        call: Further arguments that calls will have, such as the `control_image` of a pipeline with a ControlNet.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: before anything is done, with everything that stands in the way: networks quantised by bitsandbytes,
            offloaded, placed by a device map or compiled with other settings; arguments that cannot work, or lack the
            pictures that calls of this pipeline start from.
        ImportError: if float8 is asked for, and torchao is not installed.
    """
    check_choice("mode", mode, MODES)
    settings = Settings(mode=mode, regional=regional, backend=backend, float8=float8)
    if float8:
        check_float8()
    obstacles = list(_obstacles(pipe, settings))
    if obstacles:
        raise ValueError(f"this pipeline cannot be compiled: {'; '.join(obstacles)}")
    _check_call(pipe, call)
    lengths = _check_lengths(text_lengths)
    batches = [whole_number("batch_sizes", batch) for batch in batch_sizes]
    numbers_of_steps = [whole_number("steps", number) for number in steps]
    wanted: list[tuple[int | None, int | None]] = [(None, None)] if sizes is None else list(sizes)
    with _checking(pipe):
        for size, batch, number in product(wanted, batches[:1], numbers_of_steps[:1]):
            _draw(pipe, size, batch, lengths[0], number, call)

    began = time.perf_counter()
    _compile_networks(pipe, settings)
    _compile_text(pipe, settings, lengths)
    has_graphs = MODES[mode] != mode and pipe.device_of("transformer").type == "cuda"
    with _warming_up(pipe):
        _warm_up(pipe, wanted, batches, numbers_of_steps, DRAWS_WITH_GRAPHS if has_graphs else 1, call)
    logger.info("compiled and warm after %.0f s", time.perf_counter() - began)
    return pipe
