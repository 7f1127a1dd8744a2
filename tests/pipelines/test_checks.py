"""Arguments that cannot work: a ValueError that names what was found and what is wanted, before a network runs."""

import pytest
import torch

from sana_sprint import SanaSprintPipeline, SanaTransformer2DModel


class Counted:
    """Counts how often the modules of a pipeline were called."""

    def __init__(self, pipe: SanaSprintPipeline) -> None:
        self.calls = 0
        modules = [pipe.text_encoder, pipe.transformer, pipe.vae.decoder]
        self.hooks = [module.register_forward_pre_hook(self.count) for module in modules]

    def count(self, _module, _arguments) -> None:
        self.calls += 1


@pytest.fixture
def counted(pipe):
    counted = Counted(pipe)
    yield counted
    for hook in counted.hooks:
        hook.remove()


EMBEDS = torch.zeros(2, 16, 32)
MASK = torch.ones(2, 16, dtype=torch.long)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        pytest.param({"prompt": None}, "neither", id="no prompt"),
        pytest.param({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, "both", id="prompt and embeddings"),
        pytest.param({"prompt_attention_mask": MASK[:1]}, "belongs to prompt_embeds", id="mask beside a prompt"),
        # C2
        pytest.param({"prompt": []}, r"non-empty list.*\[\]", id="empty list"),
        pytest.param({"prompt": [None]}, "None at position 0", id="prompt None in a list"),
        pytest.param({"prompt": ["a", 1]}, "1 at position 1", id="number in a list"),
        pytest.param({"prompt": 3}, "3", id="number as prompt"),
        # C3
        pytest.param({"height": 0}, "height must be a positive whole number, got 0", id="height 0"),
        pytest.param({"width": -64}, "width must be a positive whole number, got -64", id="negative width"),
        pytest.param({"width": "64"}, "width must be a positive whole number, got '64'", id="text as width"),
        pytest.param({"height": 64.5}, "height must be a positive whole number, got 64.5", id="broken height"),
        pytest.param({"height": True}, "height must be a positive whole number, got True", id="bool as height"),
        pytest.param({"height": 60}, "multiples of 8, got 60x64", id="height that does not fit the latents"),
        pytest.param({"num_images_per_prompt": 0}, "num_images_per_prompt .* got 0", id="no images"),
        pytest.param({"guidance_scale": None}, "guidance_scale must be a finite number, got None", id="no guidance"),
        pytest.param({"guidance_scale": float("nan")}, "got nan", id="guidance nan"),
        pytest.param({"guidance_scale": "4.5"}, "got '4.5'", id="text as guidance"),
        # B7
        pytest.param({"num_inference_steps": 0, "intermediate_timesteps": None}, "got 0", id="no steps"),
        pytest.param({"num_inference_steps": -1}, "got -1", id="negative steps"),
        pytest.param({"num_inference_steps": None}, "got None", id="steps None"),
        # C4
        pytest.param({"latents": torch.zeros(2, 4, 8, 8)}, r"\(1, 4, 8, 8\), got \(2, 4, 8, 8\)", id="latents batch"),
        pytest.param({"latents": torch.zeros(1, 4, 8, 9)}, r"got \(1, 4, 8, 9\)", id="latents width"),
        pytest.param({"latents": [[0.0]]}, "got list", id="latents in a list"),
        pytest.param({"generator": [torch.Generator()] * 2}, "list of 2 for 1 pictures", id="generators"),
        pytest.param(
            {"generator": [torch.Generator()] * 2, "latents": torch.zeros(1, 4, 8, 8)},
            "list of 2 for 1 pictures",
            id="generators beside latents",
        ),
        pytest.param({"generator": 42}, "got 42", id="seed as generator"),
        pytest.param({"max_sequence_length": 0}, "max_sequence_length .* got 0", id="no tokens"),
        pytest.param({"callback_on_step_end_tensor_inputs": ["noise"]}, "'latents'.*got 'noise'", id="callback tensor"),
        # C9
        pytest.param({"output_type": "foo"}, "'pil', 'np', 'pt', 'latent', got 'foo'", id="output type"),
        pytest.param({"output_type": None}, "got None", id="output type None"),
        pytest.param({"max_timesteps": 3.0}, "got 3.0", id="first angle beyond pi/2"),
        pytest.param({"timesteps": [0.5, 1.0, 0.0]}, "descend", id="angles that ascend"),
    ],
)
def test_what_cannot_work_is_refused_before_a_network_runs(pipe, counted, short, asked, says):
    with pytest.raises(ValueError, match=says):
        pipe(**{"prompt": "a red circle", **short, **asked})
    assert counted.calls == 0


@pytest.mark.parametrize(
    ("embeds", "mask", "says"),
    [
        pytest.param(EMBEDS, None, "prompt_attention_mask, got None", id="no mask"),
        pytest.param(EMBEDS, MASK[:1], r"\(2, 16, 32\) and \(1, 16\)", id="mask of another batch"),
        pytest.param(EMBEDS, MASK[:, :8], r"\(2, 16, 32\) and \(2, 8\)", id="mask of another length"),
        pytest.param(EMBEDS[0], MASK, r"\(16, 32\)", id="embeddings without batch"),
        pytest.param(EMBEDS[..., :8], MASK, "caption_channels=32 as width, got 8", id="embeddings of another width"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_before_a_network_runs(pipe, counted, short, embeds, mask, says):
    with pytest.raises(ValueError, match=says):
        pipe(**short, prompt_embeds=embeds, prompt_attention_mask=mask)
    assert counted.calls == 0


def test_a_prompt_without_text_encoder_is_refused(tiny_pipeline_parts, short):
    pipe = SanaSprintPipeline(**{**tiny_pipeline_parts, "text_encoder": None})
    with pytest.raises(ValueError, match="needs prompt_embeds"):
        pipe("a red circle", **short)


def test_pixels_without_an_autoencoder_are_refused(tiny_pipeline_parts, short):
    pipe = SanaSprintPipeline(**{**tiny_pipeline_parts, "vae": None})
    with pytest.raises(ValueError, match="output_type='latent', got 'pil'"):
        pipe("a red circle", **{**short, "output_type": "pil"})


# C5
def test_sizes_must_fit_the_patches_as_well_as_the_latents(tiny_pipeline_parts, short):
    transformer = SanaTransformer2DModel.from_config(tiny_pipeline_parts["transformer"].config, patch_size=2).eval()
    pipe = SanaSprintPipeline(**{**tiny_pipeline_parts, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", **short).images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="multiples of 16, got 72x64"):
        pipe("a red circle", **{**short, "height": 72})


def test_prepare_latents_counts_generators_even_if_latents_are_given(pipe):
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="list of 3 for 1 pictures"):
        pipe.prepare_latents(1, 4, 64, 64, torch.float32, torch.device("cpu"), [torch.Generator()] * 3, latents)
