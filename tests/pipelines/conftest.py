"""The tiny pipeline as ours and as diffusers', with the same weights, quantised too, and short calls' arguments."""

from copy import deepcopy
from typing import Any

import diffusers.models.autoencoders.autoencoder_dc as their_autoencoder
import diffusers.models.transformers.sana_transformer as their_transformer
import diffusers.pipelines.sana.pipeline_sana_sprint as their_pipeline
import diffusers.pipelines.sana.pipeline_sana_sprint_img2img as their_image_pipeline
import diffusers.schedulers.scheduling_scm as their_scheduler
import pytest
import torch
from control_calls import BASES, ring
from diffusers import PipelineQuantizationConfig
from wide_text import wide_text_encoder

from sana_sprint import (
    SanaSprintControlNetImg2ImgPipeline,
    SanaSprintControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintInpaintPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)


@pytest.fixture(scope="session")
def their_parts(tiny_pipeline_parts) -> dict[str, Any]:
    """The components as diffusers' classes, with the same weights."""
    vae = their_autoencoder.AutoencoderDC.from_config(tiny_pipeline_parts["vae"].config).eval()
    vae.load_state_dict(tiny_pipeline_parts["vae"].state_dict())
    transformer = their_transformer.SanaTransformer2DModel.from_config(tiny_pipeline_parts["transformer"].config).eval()
    transformer.load_state_dict(tiny_pipeline_parts["transformer"].state_dict())
    scheduler = their_scheduler.SCMScheduler()
    tokenizer = deepcopy(tiny_pipeline_parts["tokenizer"])  # diffusers' pipeline changes its tokenizer
    theirs = {"tokenizer": tokenizer, "vae": vae, "transformer": transformer, "scheduler": scheduler}
    return {**tiny_pipeline_parts, **theirs}


@pytest.fixture
def pipe(tiny_pipeline_parts) -> SanaSprintPipeline:
    """Our pipeline around our components, without a progress bar."""
    pipeline = SanaSprintPipeline(**{**tiny_pipeline_parts, "scheduler": SCMScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def their_pipe(their_parts) -> their_pipeline.SanaSprintPipeline:
    """diffusers' pipeline around diffusers' components, without a progress bar."""
    pipeline = their_pipeline.SanaSprintPipeline(**{**their_parts, "scheduler": their_scheduler.SCMScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def img2img(tiny_pipeline_parts) -> SanaSprintImg2ImgPipeline:
    """Our image-to-image pipeline around the same components."""
    pipeline = SanaSprintImg2ImgPipeline(**{**tiny_pipeline_parts, "scheduler": SCMScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def their_img2img(their_parts) -> their_image_pipeline.SanaSprintImg2ImgPipeline:
    """diffusers' image-to-image pipeline around diffusers' components."""
    pipeline = their_image_pipeline.SanaSprintImg2ImgPipeline(
        **{**their_parts, "scheduler": their_scheduler.SCMScheduler()}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def inpaint(tiny_pipeline_parts) -> SanaSprintInpaintPipeline:
    """Our inpainting pipeline around the same components."""
    pipeline = SanaSprintInpaintPipeline(**{**tiny_pipeline_parts, "scheduler": SCMScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """Three different pictures of 64 by 64 pixels, with values in [0, 1]."""
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def right_half() -> torch.Tensor:
    """A mask of 64 by 64 pixels."""
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    return mask


@pytest.fixture
def short() -> dict[str, Any]:
    """Arguments for a call that takes milliseconds and returns latents; what both pipelines accept."""
    return {
        "height": 64,
        "width": 64,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


@pytest.fixture
def seeded():
    """Makes generators: one for a seed, a list for a list of seeds."""

    def make(seed: int | list[int]) -> torch.Generator | list[torch.Generator]:
        if isinstance(seed, list):
            return [torch.Generator().manual_seed(one) for one in seed]
        return torch.Generator().manual_seed(seed)

    return make


@pytest.fixture(scope="session")
def wide_folder(tiny_pipeline_parts, tmp_path_factory) -> str:
    """The tiny pipeline with a transformer and a text encoder that are wide enough for weights of 4 bits."""
    text_encoder = wide_text_encoder(len(tiny_pipeline_parts["tokenizer"]))
    transformer = SanaTransformer2DModel.from_config(
        tiny_pipeline_parts["transformer"].config,
        num_attention_heads=4,
        attention_head_dim=32,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=64,
    )
    parts = {"text_encoder": text_encoder, "transformer": transformer.eval()}
    where = tmp_path_factory.mktemp("wide") / "pipeline"
    SanaSprintPipeline(**{**tiny_pipeline_parts, **parts}).save_pretrained(where)
    return str(where)


@pytest.fixture
def load_wide(wide_folder):
    """Loads that pipeline in bfloat16, transformer and text encoder quantised to so many bits where 8 or 4 are asked.

    Its autoencoder works in strips in every picture of more than 16 rows.
    """

    def load(bits: int = 16, **options: Any) -> SanaSprintPipeline:
        if bits != 16:
            settings = {f"load_in_{bits}bit": True}
            if bits == 4:
                settings["bnb_4bit_compute_dtype"] = torch.bfloat16
            options["quantization_config"] = PipelineQuantizationConfig(
                f"bitsandbytes_{bits}bit", settings, components_to_quantize=["transformer", "text_encoder"]
            )
        pipeline = SanaSprintPipeline.from_pretrained(wide_folder, **{"torch_dtype": torch.bfloat16, **options})
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_strips(rows=16)
        return pipeline

    return load


@pytest.fixture
def draw(short):
    """Draws a picture of 128 rows, always from the same seed; returns it on the CPU in float32."""

    def picture_of(pipeline: SanaSprintPipeline, **arguments: Any) -> torch.Tensor:
        asked = {"prompt": "a red circle", **short, "height": 128, "output_type": "pt", **arguments}
        return pipeline(**asked, generator=torch.Generator().manual_seed(0)).images.float().cpu()

    return picture_of


@pytest.fixture(params=BASES, ids=["text", "image"])
def control_kind(request) -> type:
    return request.param


@pytest.fixture
def beginning(control_kind, pictures) -> dict[str, Any]:
    """What that pipeline starts from, if from anything."""
    return {"image": pictures[0], "strength": 0.7} if control_kind is SanaSprintControlNetImg2ImgPipeline else {}


@pytest.fixture
def make_controlled(tiny_pipeline_parts):
    """Makes a pipeline of copies of the tiny components, with an open ControlNet unless another is given."""

    def pipeline_of(control_kind: type = SanaSprintControlNetPipeline, controlnet: Any = None, **parts: Any) -> Any:
        from tiny_control import open_control

        copies = {name: deepcopy(part) for name, part in {**tiny_pipeline_parts, **parts}.items()}
        if control_kind in BASES:
            copies["controlnet"] = open_control(copies["transformer"]).eval() if controlnet is None else controlnet
        pipeline = control_kind(**copies)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return pipeline_of


@pytest.fixture
def sketch(short, seeded):
    """Draws latents of one prompt after a ring, always from the same seed."""

    def latents_of(pipeline: Any, **arguments: Any) -> torch.Tensor:
        drawing = {"control_image": ring()} if hasattr(pipeline, "controlnet") else {}
        return pipeline(**{"prompt": "a red circle", **short, **drawing, **arguments}, generator=seeded(0)).images

    return latents_of
