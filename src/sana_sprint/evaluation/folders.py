"""A folder of pictures to pixels, and a file of captions to the caption of each picture.

H W pixels.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sana_sprint.pictures import decode_picture, open_picture, upright_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class PictureFolder:
    """The pictures in a folder and in the folders below it, in the order of their names.

    Iterating reads them, (H, W, 3) uint8 each, upright and on white where they are transparent: as large as they are,
    or the square of `size` pixels in their middle. The square is as SANA's evaluation has it: the shorter side becomes
    `size`, and the longer is cut on both ends.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no pictures.
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        self.folder = folder
        self.size = size
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.paths:
            raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Raises ValueError, with the file's name, at one that is no picture or a broken one."""
        for path in self.paths:
            with _named(path):
                pixels = decode_picture(path.read_bytes())
            if self.size is not None:
                pixels = ImageOps.fit(pixels, (self.size, self.size), Image.Resampling.BILINEAR)
            yield np.asarray(pixels)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside, an error of reading a picture names its file."""
    try:
        yield
    except Exception as error:  # each of Pillow's formats has its own kinds for damaged files
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


def check_one_size(*folders: PictureFolder) -> None:
    """Reads the headers of all pictures, and raises ValueError, naming two, unless all are of one size."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in (path for folder in folders if folder.size is None for path in folder.paths):
        with _named(path), path.open("rb") as stream, open_picture(stream) as image:
            sizes.setdefault(upright_size(image), path)
        if len(sizes) > 1:
            (width, height), (other_width, other_height) = sizes
            first, second = sizes.values()
            raise ValueError(
                f"pictures must be of one size, but {first} has {width}x{height} pixels and {second} "
                f"{other_width}x{other_height}: give a size, and squares of it are cut"
            )


def read_captions(path: Path) -> dict[str, str]:
    """Captions by the name of their picture without its ending.

    The file is JSON: {"name": "caption"}, or {"name": {"prompt": "caption"}} as MJHQ-30K's `meta_data.json` has it.

    Raises:
        ValueError: if it is something else.
    """
    wanted = f'{path} must be JSON such as {{"name": "caption"}} or {{"name": {{"prompt": "caption"}}}}'
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{wanted}, and holds a {type(entries).__name__}")
    captions: dict[str, str] = {}
    for name, entry in entries.items():
        caption = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(caption, str):
            raise ValueError(f"{wanted}, but {name!r} has no caption")
        captions[name] = caption
    return captions
