"""Our image-to-image pipeline beside diffusers' with the same weights, wherever its rounding of strength is none.

diffusers starts at whole steps: strength k/n of n steps, and 1.
"""

import inspect

import diffusers.pipelines.sana.pipeline_sana_sprint_img2img as their_pipeline
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sana_sprint import SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline, SanaSprintPipeline

CIRCLE = "a red circle"
STAR = "a small green star"
# Latents are of unit scale. In float32 the networks sum up to 64 tokens in another order, over up to four steps.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EVENLY = {"intermediate_timesteps": None}
# Replaced by `encode_image`, the clock and sana_sprint.text.cleaning.
LEFT_OUT = {"prepare_image", "get_timesteps", "prepare_extra_step_kwargs", "bad_punct_regex"}


def photo(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_signature_of_a_call_is_diffusers_but_for_the_default_size():
    ours = dict(inspect.signature(SanaSprintImg2ImgPipeline.__call__).parameters)
    theirs = dict(inspect.signature(their_pipeline.SanaSprintImg2ImgPipeline.__call__).parameters)
    assert list(ours) == list(theirs)
    differing = {name for name in ours if ours[name].default != theirs[name].default}
    assert differing == {"height", "width"}


def test_inpainting_adds_a_mask_and_changes_one_default():
    image, inpaint = (
        dict(inspect.signature(kind.__call__).parameters)
        for kind in (SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline)
    )
    assert [name for name in inpaint if name != "mask_image"] == list(image)
    assert {name for name in image if image[name].default != inpaint[name].default} == {"strength"}


@pytest.mark.parametrize("kind", [SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline])
def test_components_and_methods_are_diffusers(kind, their_img2img, tiny_pipeline_parts):
    theirs = their_pipeline.SanaSprintImg2ImgPipeline
    pipe = kind(**tiny_pipeline_parts)
    assert list(inspect.signature(kind).parameters) == list(inspect.signature(theirs).parameters)
    assert kind._get_signature_keys(pipe) == theirs._get_signature_keys(their_img2img)
    assert dict(pipe.config).keys() == dict(their_img2img.config).keys()
    for name in ("model_cpu_offload_seq", "_optional_components", "_exclude_from_cpu_offload"):
        assert getattr(kind, name) == getattr(theirs, name)
    assert set(theirs._callback_tensor_inputs) <= set(kind._callback_tensor_inputs)
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public - set(dir(kind)) == LEFT_OUT


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"strength": 0.5}, id="1 of 2 steps"),
        pytest.param({"strength": 1.0}, id="2 of 2 steps"),
        pytest.param({"num_inference_steps": 1, "strength": 1.0, **EVENLY}, id="1 of 1 step"),
        *(
            pytest.param({"num_inference_steps": 3, "strength": k / 3, **EVENLY}, id=f"{k} of 3 steps")
            for k in (1, 2, 3)
        ),
        *(
            pytest.param({"num_inference_steps": 4, "strength": k / 4, **EVENLY}, id=f"{k} of 4 steps")
            for k in (1, 2, 3, 4)
        ),
        pytest.param({"strength": 0.5, "max_timesteps": 1.5, "intermediate_timesteps": 1.0}, id="other angles"),
        pytest.param({"strength": 0.5, "guidance_scale": 1.0}, id="guidance"),
        pytest.param({"strength": 0.5, "num_images_per_prompt": 3}, id="3 images"),
        pytest.param({"strength": 0.5, "prompt": [CIRCLE, STAR]}, id="2 prompts, 1 picture"),
        pytest.param({"strength": 0.5, "height": 96, "width": 64, "image": photo(96, 64)}, id="not square"),
        pytest.param({"strength": 0.5, "image": photo(50, 90)}, id="another size and shape"),
        pytest.param({"strength": 0.5, "image": [photo(200, 64), photo(200, 64)], "prompt": [CIRCLE, STAR]}, id="list"),
        pytest.param({"strength": 0.5, "image": torch.rand(1, 3, 40, 33)}, id="small tensor"),
        pytest.param({"strength": 0.5, "image": np.random.default_rng(1).random((64, 64, 3), np.float32)}, id="array"),
        pytest.param({"strength": 0.5, "output_type": "np"}, id="np"),
        pytest.param({"strength": 0.5, "output_type": "pt"}, id="pt"),
    ],
)
def test_a_call_gives_diffusers_result(img2img, their_img2img, short, seeded, asked):
    arguments = {"prompt": CIRCLE, "image": photo(64, 64), **short, **asked}
    ours = img2img(**arguments, generator=seeded(0)).images
    theirs = their_img2img(**arguments, generator=seeded(0)).images
    assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), **CLOSE)


def test_one_generator_per_image_and_a_second_call_give_diffusers_result(img2img, their_img2img, short, seeded):
    arguments = {"prompt": CIRCLE, "image": photo(64, 64), "strength": 0.5, "num_images_per_prompt": 2, **short}
    mine, other = seeded([1, 2]), seeded([1, 2])
    for _ in range(2):
        ours = img2img(**arguments, generator=mine).images
        assert_close(ours, their_img2img(**arguments, generator=other).images, **CLOSE)


def test_pil_pictures_are_diffusers_pictures(img2img, their_img2img, short, seeded):
    arguments = {"prompt": CIRCLE, "image": photo(64, 64), "strength": 0.5, **short, "output_type": "pil"}
    (ours,) = img2img(**arguments, generator=seeded(0)).images
    (theirs,) = their_img2img(**arguments, generator=seeded(0)).images
    # Rounded to whole levels of 0 to 255, values that differ in the sixth digit may fall on two sides.
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def test_diffusers_components_give_the_same_result_in_our_pipelines(
    their_parts, their_img2img, inpaint, short, seeded, right_half
):
    arguments = {"prompt": CIRCLE, "image": photo(64, 64), "strength": 0.5, **short}
    ours = SanaSprintImg2ImgPipeline(**their_parts)
    ours.set_progress_bar_config(disable=True)
    drawn = ours(**arguments, generator=seeded(0)).images
    assert_close(drawn, their_img2img(**arguments, generator=seeded(0)).images, **CLOSE)

    theirs = SanaSprintInpaintPipeline(**their_parts)
    theirs.set_progress_bar_config(disable=True)
    redrawn = theirs(**arguments, mask_image=right_half, generator=seeded(0)).images
    assert_close(redrawn, inpaint(**arguments, mask_image=right_half, generator=seeded(0)).images, **CLOSE)


def test_our_components_give_the_same_result_in_diffusers_pipeline(img2img, their_img2img, short, seeded):
    arguments = {"prompt": CIRCLE, "image": photo(64, 64), "strength": 0.5, **short}
    expected = their_img2img(**arguments, generator=seeded(0)).images
    mixed = their_pipeline.SanaSprintImg2ImgPipeline(**{**img2img.components, "tokenizer": their_img2img.tokenizer})
    mixed.set_progress_bar_config(disable=True)
    assert_close(mixed(**arguments, generator=seeded(0)).images, expected, **CLOSE)


def test_from_pipe_goes_from_any_pipeline_to_any_other_with_the_same_components(pipe, their_img2img):
    kinds = (SanaSprintImg2ImgPipeline, SanaSprintInpaintPipeline, SanaSprintPipeline)
    first = pipe
    for kind in kinds:
        other = kind.from_pipe(first)
        assert other.components == pipe.components
        first = other
    assert SanaSprintImg2ImgPipeline.from_pipe(their_img2img).components == their_img2img.components
    back = their_pipeline.SanaSprintImg2ImgPipeline.from_pipe(their_img2img)
    assert back.components == their_img2img.components


def test_a_folder_saved_by_one_pipeline_loads_as_any_other(img2img, tmp_path, short, seeded, right_half):
    arguments = {"prompt": CIRCLE, "image": photo(64, 64), **short}
    img2img.save_pretrained(tmp_path)
    theirs = their_pipeline.SanaSprintImg2ImgPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    expected = img2img(**arguments, strength=0.5, generator=seeded(0)).images
    assert_close(theirs(**arguments, strength=0.5, generator=seeded(0)).images, expected, **CLOSE)
    for kind, more in [(SanaSprintImg2ImgPipeline, {}), (SanaSprintInpaintPipeline, {"mask_image": right_half})]:
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        ours = kind(**img2img.components)
        ours.set_progress_bar_config(disable=True)
        drawn = [one(**arguments, **more, generator=seeded(0)).images for one in (ours, loaded)]
        assert_close(*drawn, **CLOSE)
