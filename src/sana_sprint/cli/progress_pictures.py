"""A network in training to a sheet of pictures of the same prompts, again and again, which shows how far it is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import screen
from sana_sprint.cli.model import FLOW_STEPS, SPRINT_STEPS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from sana_sprint import AutoencoderDC, SanaTransformer2DModel

_GUIDANCE = 4.5


class ProgressPictures:
    """Draws the prompts, the same noise for each every time, into `pictures` below a folder; a `Validation`.

    Args:
        pipeline: a folder: whose text encoder reads the prompts, once, and whose autoencoder decodes.
        prompts: what to draw.
        output: the folder.
        device: where to draw.
        has_guidance: whether the guidance scale is an input of the network, which then draws in few steps; otherwise it
            is guided by its own velocity without a caption.
    """

    def __init__(
        self, pipeline: Path, prompts: Sequence[str], output: Path, device: "torch.device", has_guidance: bool
    ) -> None:
        from sana_sprint import SanaSprintPipeline
        from sana_sprint.cli.model import choose_dtype
        from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION

        self.prompts = tuple(prompts)
        self.folder = output / "pictures"
        self.device = device
        self.has_guidance = has_guidance
        dtype = choose_dtype("auto", device)
        pipe = SanaSprintPipeline.from_pretrained(pipeline, transformer=None, torch_dtype=dtype).to(device)
        self.vae: AutoencoderDC = pipe.vae
        self.text = pipe.encode_prompt(self.prompts, device=device, complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION)
        # The empty caption stands without the instruction, as in training.
        self.empty = pipe.encode_prompt([""] * len(self.prompts), device=device)

    def __call__(self, network: "SanaTransformer2DModel", step: int) -> None:
        from sana_sprint.cli.sheet import draw_sheet
        from sana_sprint.files import write_whole

        # The average of a network that FSDP has sharded is not where the network is.
        home = network.device
        network.to(self.device)
        try:
            sheet = draw_sheet(self._draw(network), self.prompts)
        finally:
            network.to(home)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}.png"
        write_whole(path, lambda partial: sheet.save(partial, format="PNG"))

    def _draw(self, network: "SanaTransformer2DModel") -> "list[Image]":
        import torch

        embeds, mask = self.text
        pipe, options = self._sprint(network) if self.has_guidance else self._flow(network)
        pipe.set_progress_bar_config(disable=True)
        images, *_ = pipe(
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            guidance_scale=_GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(len(self.prompts))],
            return_dict=False,
            **options,
        )
        return images

    def _sprint(self, network: "SanaTransformer2DModel") -> tuple[Any, dict[str, Any]]:
        """A pipeline around the network, and its settings."""
        from sana_sprint import SanaSprintPipeline, SCMScheduler

        parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": self.vae, "transformer": network}
        return SanaSprintPipeline(**parts, scheduler=SCMScheduler()), {"num_inference_steps": SPRINT_STEPS}

    def _flow(self, network: "SanaTransformer2DModel") -> tuple[Any, dict[str, Any]]:
        """A pipeline around the network that guides it without a caption, and its settings."""
        from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

        from sana_sprint.checkpoints.recognise import FLOW_SHIFT

        size = network.config.sample_size * self.vae.spatial_compression_ratio
        negative_embeds, negative_mask = self.empty
        options = {
            "negative_prompt": None,
            "negative_prompt_embeds": negative_embeds,
            "negative_prompt_attention_mask": negative_mask,
            "num_inference_steps": FLOW_STEPS,
            "height": size,
            "width": size,
            "use_resolution_binning": False,
        }
        return SanaPipeline(None, None, self.vae, network, FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)), options


def progress_pictures(
    pipeline: Path | None, prompts: Sequence[str], output: Path, device: "torch.device", has_guidance: bool
) -> Callable[..., None] | None:
    """What draws on the way, or None: without prompts, or, with a line that says so, without a pipeline to draw with.

    With several processes only the first one draws, and loads what it takes.
    """
    from accelerate import PartialState

    if not prompts:
        return None
    if pipeline is None:
        if PartialState().is_main_process:
            screen.report(
                "note", "no pictures on the way: what training starts from is a transformer without a pipeline"
            )
        return None
    if not PartialState().is_main_process:
        return _draw_nothing
    return ProgressPictures(pipeline, prompts, output, device, has_guidance)


def _draw_nothing(network: "SanaTransformer2DModel", step: int) -> None:
    """Stands for the pictures where another process draws them; its arguments are ignored."""
