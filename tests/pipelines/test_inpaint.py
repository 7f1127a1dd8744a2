"""Inpainting: what is kept bit for bit in every form of output, what is redrawn, and how masks are read and refused."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.testing import assert_close

from sana_sprint import SanaSprintInpaintPipeline, SCMScheduler, embedded_checkpoint
from sana_sprint.pipelines.images import Canvas
from sana_sprint.pipelines.pictures import redrawn_cells

CIRCLE = "a red circle"
STAR = "a small green star"
# The same numbers in a batch of another size: sums of at most 64 numbers of unit scale in another order.
BATCHED = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(params=["SCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def either(inpaint, request):
    """The pipeline, once with its own scheduler and once with a flow-matching one."""
    if request.param != "SCMScheduler":
        inpaint.scheduler = FlowMatchEulerDiscreteScheduler()
    return inpaint


def as_pixels(image) -> np.ndarray:
    return np.asarray(image).astype(np.float32) / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_outside_the_mask_are_the_inputs_bit_for_bit(
    inpaint, short, seeded, photo, right_half, dtype, tiny_pipeline_parts
):
    inpaint.vae = type(inpaint.vae).from_config(inpaint.vae.config).eval().to(dtype)
    inpaint.vae.load_state_dict(tiny_pipeline_parts["vae"].state_dict())
    drawn = {
        output_type: inpaint(
            CIRCLE,
            image=photo,
            mask_image=right_half,
            **{**short, "output_type": output_type},
            generator=seeded(0),
        ).images
        for output_type in ("pil", "np", "pt")
    }
    assert np.array_equal(np.asarray(drawn["pil"][0])[:, :32], np.asarray(photo)[:, :32])
    assert np.array_equal(drawn["np"][0][:, :32], as_pixels(photo)[:, :32])
    assert torch.equal(drawn["pt"][0, :, :, :32], torch.from_numpy(as_pixels(photo)).permute(2, 0, 1)[:, :, :32])
    assert np.abs(drawn["np"][0][:, 32:] - as_pixels(photo)[:, 32:]).max() > 0.1


@pytest.mark.parametrize("form", ["float tensor", "uint8 array", "grey"])
def test_every_form_of_input_is_kept(inpaint, short, seeded, photo, pictures, right_half, form):
    image, expected = {
        "float tensor": (pictures[0], pictures[0]),
        "uint8 array": (np.asarray(photo), torch.from_numpy(as_pixels(photo)).permute(2, 0, 1)),
        "grey": (photo.convert("L"), torch.from_numpy(as_pixels(photo.convert("L"))).expand(3, -1, -1)),
    }[form]
    asked = {**short, "output_type": "pt"}
    drawn = inpaint(CIRCLE, image=image, mask_image=right_half, **asked, generator=seeded(0)).images
    assert torch.equal(drawn[0, :, :, :32], expected[:, :, :32])


def test_latents_outside_the_feathered_mask_are_the_inputs_bit_for_bit(either, short, seeded, pictures, right_half):
    latents = either.encode_image(pictures[:1], 64, 64)
    asked = {"prompt": CIRCLE, "mask_image": right_half, **short}
    for image in (pictures[0], latents):
        drawn = either(image=image, **asked, generator=seeded(0)).images
        assert torch.equal(drawn[..., :3], latents[..., :3])  # cell 3 touches the mask, which is feathered by a cell
        assert (drawn[..., 4:] - latents[..., 4:]).abs().max() > 0.1


def test_latents_in_the_place_of_pixels_draw_the_same_and_decode(inpaint, short, seeded, pictures, right_half):
    latents = inpaint.encode_image(pictures[0], 64, 64)
    asked = {"prompt": CIRCLE, "mask_image": right_half, **short, "output_type": "pt"}
    pixels = inpaint(image=pictures[0], **asked, generator=seeded(0)).images
    decoded = inpaint(image=latents, **asked, generator=seeded(0)).images
    assert_close(decoded[..., 32:], pixels[..., 32:], atol=0, rtol=0)
    assert not decoded[..., :32].equal(pixels[..., :32])


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_a_mask_of_nothing_returns_the_input(inpaint, short, seeded, photo, strength):
    asked = {"prompt": CIRCLE, "image": photo, "strength": strength, **short, "output_type": "pil"}
    (drawn,) = inpaint(mask_image=Image.new("L", (64, 64), 0), **asked, generator=seeded(0)).images
    assert drawn.tobytes() == photo.tobytes()


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_a_mask_of_everything_is_image_to_image(inpaint, img2img, short, seeded, photo, strength, output_type):
    asked = {"prompt": CIRCLE, "image": photo, "strength": strength, **short, "output_type": output_type}
    drawn = inpaint(mask_image=Image.new("L", (64, 64), 255), **asked, generator=seeded(0)).images
    assert_close(drawn, img2img(**asked, generator=seeded(0)).images, atol=0, rtol=0)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_between_steps_what_is_kept_is_the_input_with_the_noise_of_the_next_angle(
    inpaint, short, seeded, pictures, right_half, strength
):
    generator = seeded(0)
    torch.randn(1, 4, 8, 8, generator=generator)  # the first latents'
    noise = torch.randn(1, 4, 8, 8, generator=generator)  # the first step's
    clean = inpaint.encode_image(pictures[0], 64, 64)
    seen = []
    inpaint(
        CIRCLE,
        image=pictures[0],
        mask_image=right_half,
        strength=strength,
        **short,
        generator=seeded(0),
        callback_on_step_end=lambda *given: seen.append(given[3]["latents"].clone()),
    )
    angle = torch.tensor(1.3)
    expected = (torch.cos(angle) * clean + torch.sin(angle) * noise) / 2  # sigma_data
    assert_close(seen[0][..., :3], expected[..., :3], atol=1e-5, rtol=0)  # float32, there and back through the bridge
    assert not torch.allclose(seen[0][..., 4:], expected[..., 4:], atol=1e-2)


@pytest.mark.parametrize("timesteps", [None, [1.0, 0.0]], ids=["default", "one step from below pi/2"])
def test_what_is_kept_is_seen_by_what_is_drawn_from_noise(inpaint, short, seeded, pictures, right_half, timesteps):
    drawn = [
        inpaint(
            CIRCLE,
            image=torch.where(right_half.bool(), pictures[0], pictures[other]),
            mask_image=right_half,
            strength=1.0,
            timesteps=timesteps,
            **short,
            generator=seeded(0),
        ).images
        for other in (1, 2)
    ]
    # As latents: the decoder looks at its whole picture too.
    assert (drawn[0][..., 5:] - drawn[1][..., 5:]).abs().max() > 1e-3


def test_what_is_redrawn_depends_on_the_seed_and_the_prompt(either, short, seeded, photo, right_half):
    asked = {"image": photo, "mask_image": right_half, **short, "output_type": "pt"}
    plain = either(CIRCLE, **asked, generator=seeded(0)).images
    for prompt, seed in [(CIRCLE, 1), (STAR, 0)]:
        other = either(prompt, **asked, generator=seeded(seed)).images
        assert (other - plain)[..., 32:].abs().max() > 1e-3
        assert (other - plain)[..., :32].abs().max() == 0


def test_a_soft_mask_mixes_pixels(inpaint, short, seeded, pictures):
    asked = {"prompt": CIRCLE, "image": pictures[0], **short, "output_type": "pt"}
    half = inpaint(mask_image=torch.full((64, 64), 0.5), **asked, generator=seeded(0)).images
    latents = inpaint(
        mask_image=torch.full((64, 64), 0.5), **{**asked, "output_type": "latent"}, generator=seeded(0)
    ).images
    with torch.no_grad():
        decoded = inpaint.vae.decode(latents / inpaint.vae.config.scaling_factor, return_dict=False)[0]
    expected = (pictures[:1] + (decoded / 2 + 0.5).clamp(0, 1)) / 2
    assert_close(half, expected, atol=1e-6, rtol=0)  # one rounding of values in [0, 1]


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(lambda mask: mask[None], id="channel"),
        pytest.param(lambda mask: mask[None, None], id="batch"),
        pytest.param(lambda mask: mask.bool(), id="bool"),
        pytest.param(lambda mask: mask.to(torch.uint8), id="uint8 0 and 1"),
        pytest.param(lambda mask: (mask * 255).to(torch.uint8), id="uint8 0 and 255"),
        pytest.param(lambda mask: mask.long(), id="int64 0 and 1"),
        pytest.param(lambda mask: mask.numpy(), id="array"),
        pytest.param(lambda mask: mask.numpy()[..., None], id="array with channel"),
        pytest.param(lambda mask: mask.numpy()[None, ..., None], id="batch of arrays"),
        pytest.param(lambda mask: [Image.fromarray((mask.numpy() * 255).astype(np.uint8))], id="PIL L"),
        pytest.param(lambda mask: Image.fromarray((mask.numpy() * 255).astype(np.uint8)).convert("1"), id="PIL 1"),
        pytest.param(lambda mask: Image.fromarray((mask.numpy() * 255).astype(np.uint8)).convert("RGB"), id="PIL RGB"),
    ],
)
def test_every_form_of_mask_means_the_same(inpaint, short, seeded, photo, right_half, mask):
    asked = {"prompt": CIRCLE, "image": photo, **short, "output_type": "pt"}
    plain = inpaint(mask_image=right_half, **asked, generator=seeded(0)).images
    assert_close(inpaint(mask_image=mask(right_half), **asked, generator=seeded(0)).images, plain, atol=0, rtol=0)


def test_images_and_masks_stay_with_their_prompts(inpaint, short, seeded, pictures, right_half):
    masks = torch.stack([right_half, 1 - right_half])
    asked = {**short, "output_type": "pt", "num_images_per_prompt": 2}
    together = inpaint(
        [CIRCLE, STAR], image=pictures[:2], mask_image=masks, **asked, generator=seeded([0, 1, 2, 3])
    ).images
    alone = [
        inpaint(prompt, image=picture, mask_image=mask, **asked, generator=seeded(seeds)).images
        for prompt, picture, mask, seeds in [
            (CIRCLE, pictures[0], masks[0], [0, 1]),
            (STAR, pictures[1], masks[1], [2, 3]),
        ]
    ]
    assert_close(together, torch.cat(alone), **BATCHED)


def test_one_image_may_have_several_masks(inpaint, short, seeded, pictures, right_half):
    masks = [right_half, 1 - right_half]
    asked = {**short, "output_type": "pt"}
    drawn = inpaint([CIRCLE] * 2, image=pictures[0], mask_image=masks, **asked, generator=seeded([0, 1])).images
    assert torch.equal(drawn[0][..., :32], pictures[0][..., :32])
    assert torch.equal(drawn[1][..., 32:], pictures[0][..., 32:])


def test_the_result_has_the_size_of_the_image_unless_another_is_asked_for(inpaint, short, seeded, right_half):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 72, 3), dtype=np.uint8))
    mask = np.zeros((96, 72), np.uint8)
    mask[:, 36:] = 255
    asked = {"prompt": CIRCLE, "image": image, "mask_image": mask, **short, "output_type": "pil"}
    own = inpaint(**{**asked, "height": None, "width": None}, generator=seeded(0)).images[0]
    assert own.size == (72, 96)
    assert np.array_equal(np.asarray(own)[:, :36], np.asarray(image)[:, :36])
    smaller = inpaint(**{**asked, "height": 48, "width": None}, generator=seeded(0)).images[0]
    assert smaller.size == (72, 48)
    resized = image.resize((72, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(smaller)[:, :35], np.asarray(resized)[:, :35])


def test_a_size_that_is_drawn_in_a_bin_is_kept_bit_for_bit_too(inpaint, short, seeded):
    config = {**inpaint.transformer.config, "sample_size": 64}  # 512 pixels
    inpaint.transformer = type(inpaint.transformer).from_config(config).eval()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 178, 3), dtype=np.uint8))
    mask = np.zeros((100, 178), bool)
    mask[40:60, 80:120] = True
    asked = {**short, "use_resolution_binning": True, "height": None, "width": None, "output_type": "pil"}
    asked["num_inference_steps"] = 1
    (drawn,) = inpaint(CIRCLE, image=image, mask_image=mask, **asked, generator=seeded(0)).images
    assert np.array_equal(np.asarray(drawn)[~mask], np.asarray(image)[~mask])
    assert not np.array_equal(np.asarray(drawn)[mask], np.asarray(image)[mask])


def test_a_cell_is_redrawn_as_much_as_any_pixel_of_it_and_its_neighbours_somewhat():
    canvas = Canvas(height=40, width=40, asked_height=40, asked_width=40)
    mask = torch.zeros(1, 40, 40)
    mask[0, 17, 22] = 1
    cells = redrawn_cells(mask, canvas, 8)[0]
    assert cells[2, 2] == 1
    assert cells[1:4, 1:4].sum() == pytest.approx(1 + 8 / 9)
    assert cells.sum() == pytest.approx(1 + 8 / 9)
    assert redrawn_cells(torch.ones(1, 40, 40), canvas, 8).min() == 1
    assert redrawn_cells(torch.zeros(1, 40, 40), canvas, 8).max() == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"mask_image": None}, "mask_image must be given, got None"),
        ({"mask_image": []}, "got an empty list"),
        ({"mask_image": torch.zeros(64, 32)}, "the size of its image, 64x64, got 64x32"),
        ({"mask_image": Image.new("L", (32, 64))}, "the size of its image, 64x64, got 64x32"),
        ({"mask_image": torch.zeros(2, 64, 64)}, "mask_image must be one, .* got 2"),
        ({"mask_image": torch.full((64, 64), torch.nan)}, "mask_image must hold values in .* got nan to nan"),
        ({"mask_image": torch.full((64, 64), 2.0)}, "got 2 to 2"),
        ({"mask_image": torch.zeros(1, 3, 64, 64)}, "one channel, got 3"),
        ({"mask_image": np.zeros((64, 64, 3))}, "one channel, got 3"),
        ({"mask_image": Image.new("LA", (64, 64))}, "no transparency, got a PIL image in mode LA"),
        ({"mask_image": "mask.png"}, "got 'mask.png'"),
        (
            {"image": [Image.new("RGB", (64, 64)), Image.new("RGB", (32, 32))], "height": None, "prompt": [CIRCLE] * 2},
            r"images of several sizes, got \[\(32, 32\), \(64, 64\)\]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_a_network_runs(inpaint, short, pictures, right_half, asked, says):
    calls = []
    parts = (inpaint.text_encoder, inpaint.transformer, inpaint.vae.encoder, inpaint.vae.decoder)
    hooks = [part.register_forward_pre_hook(lambda *_: calls.append(True)) for part in parts]
    with pytest.raises(ValueError, match=says):
        inpaint(**{"prompt": CIRCLE, "image": pictures[0], "mask_image": right_half, **short, **asked})
    for hook in hooks:
        hook.remove()
    assert not calls


def test_the_embedded_checkpoint_redraws_within_the_mask_only(seeded):
    pipe = SanaSprintInpaintPipeline.from_pretrained(embedded_checkpoint(), scheduler=SCMScheduler())
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    mask = np.zeros((64, 64), np.uint8)
    mask[20:50, 10:40] = 255
    (drawn,) = pipe(STAR, image=image, mask_image=mask, generator=seeded(0)).images
    assert np.array_equal(np.asarray(drawn)[mask == 0], np.asarray(image)[mask == 0])
    assert not np.array_equal(np.asarray(drawn)[mask == 255], np.asarray(image)[mask == 255])
