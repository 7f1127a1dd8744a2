"""The tiny pipeline as ours and as diffusers', with the same weights, and the arguments that keep a call short."""

from copy import deepcopy
from typing import Any

import diffusers.models.autoencoders.autoencoder_dc as their_autoencoder
import diffusers.models.transformers.sana_transformer as their_transformer
import diffusers.pipelines.sana.pipeline_sana_sprint as their_pipeline
import diffusers.schedulers.scheduling_scm as their_scheduler
import pytest
import torch

from sana_sprint import SanaSprintPipeline, SCMScheduler


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
