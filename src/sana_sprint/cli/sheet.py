"""Pictures and their captions to one sheet, in rows, each caption beneath its picture."""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

# Narrower pictures are enlarged by a whole factor, so that pixels stay square and captions have room.
_LEAST_WIDTH = 256

_PAPER = "white"
_INK = "black"


def wrap(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """The text in lines no wider than `width` as `measure` sees them, broken at spaces; a longer word is cut."""
    lines = [""]
    for word in text.split():
        while measure(word) > width and len(word) > 1:
            fitting = max(1, sum(measure(word[: end + 1]) <= width for end in range(len(word))))
            lines.append(word[:fitting])
            word = word[fitting:]
        joined = f"{lines[-1]} {word}".strip()
        if measure(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return [line for line in lines if line] or [""]


def draw_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """All images, of one size, on a sheet about as wide as it is high, or with so many columns.

    Raises ValueError if the captions are not one for each image.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"a sheet needs one caption for each image, got {len(images)} and {len(captions)}")
    scale = math.ceil(_LEAST_WIDTH / images[0].width)
    tile_width, tile_height = images[0].width * scale, images[0].height * scale
    font_size = max(15, tile_width // 32)
    font = ImageFont.load_default(font_size)
    wrapped = [wrap(caption, tile_width, font.getlength) for caption in captions]
    margin, line_height = font_size, round(font_size * 1.3)
    caption_height = line_height * max(map(len, wrapped))

    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell_width, cell_height = tile_width + margin, tile_height + margin // 2 + caption_height + margin
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left = margin + index % columns * cell_width
        top = margin + index // columns * cell_height
        sheet.paste(image.resize((tile_width, tile_height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(lines):
            position = (left, top + tile_height + margin // 2 + number * line_height)
            pen.text(position, line, fill=_INK, font=font)
    return sheet
