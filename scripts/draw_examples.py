"""The pictures of docs/control.md, by the embedded checkpoint and its ControlNet: python scripts/draw_examples.py."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from sana_sprint import (
    SanaControlNetModel,
    SanaSprintControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintInpaintPipeline,
    SanaSprintPipeline,
    embedded_checkpoint,
    embedded_controlnet,
)
from sana_sprint.cli.sheet import draw_sheet
from sana_sprint.evaluation.control import edges_of, held_out_scenes

COLOURS = ("red and blue on a white ground", "yellow and green on a black ground", "orange and pink on a grey ground")
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
FILLINGS = ("a green star", "a yellow cross", "a purple triangle")
SEED = 5
SEED_ON_THE_LEFT = 18  # of a first picture that has room on the right


def seeded(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def following_drawings(pipe: SanaSprintPipeline) -> Image.Image:
    """A row for each of three drawings: itself, and what is drawn after it in two steps with captions of colours."""
    controlnet = SanaControlNetModel.from_pretrained(embedded_controlnet(), torch_dtype=pipe.dtype)
    controlled = SanaSprintControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    controlled.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(60, seed=SEED).scenes
    two_things = [drawing for scene, drawing in zip(scenes, edges_of(scenes, 64)) if len(scene.shapes) == 2]
    images, captions = [], []
    for drawing in two_things[:3]:
        images.append(drawing)
        captions.append("the drawing")
        for caption in COLOURS:
            images += controlled(caption, control_image=drawing, generator=seeded()).images
            captions.append(caption)
    return draw_sheet(images, captions, columns=1 + len(COLOURS))


def editing(pipe: SanaSprintPipeline) -> Image.Image:
    """A row of image to image at growing strengths, and one of inpainting."""
    redraw, inpaint = SanaSprintImg2ImgPipeline.from_pipe(pipe), SanaSprintInpaintPipeline.from_pipe(pipe)
    for one in (redraw, inpaint):
        one.set_progress_bar_config(disable=True)
    (first,) = pipe("a red circle on grey", generator=seeded(SEED_ON_THE_LEFT)).images
    images, captions = [first], ["a red circle on grey"]
    for strength in STRENGTHS:
        images += redraw("a blue circle on grey", image=first, strength=strength, generator=seeded()).images
        captions.append(f"a blue circle on grey, strength {strength}")
    mask = Image.new("L", first.size, "black")
    mask.paste("white", (34, 0, 64, 64))
    images += [first, mask.convert("RGB")]
    captions += ["the picture", "the mask"]
    for filling in FILLINGS:
        prompt = f"a red circle left of {filling} on grey"
        images += inpaint(prompt, image=first, mask_image=mask, generator=seeded()).images
        captions.append(prompt)
    return draw_sheet(images, captions, columns=1 + len(STRENGTHS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    pipe = SanaSprintPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    for name, sheet in {"control": following_drawings, "editing": editing}.items():
        sheet(pipe).save(output / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
