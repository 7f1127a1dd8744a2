"""Pictures to files: a name from prompt and seed, never one that is taken, and never a file half written."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

# File systems allow 255 bytes to a name; seed, counter, ending and the temporary name's extras fit in the rest.
_SLUG_BYTES = 120

_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def slug(prompt: str) -> str:
    """The prompt's letters and digits in lower case, of any script, joined by hyphens; "empty" if there are none."""
    words = "".join(sign if sign.isalnum() else " " for sign in prompt.lower()).split()
    shortened = "-".join(words).encode()[:_SLUG_BYTES].decode(errors="ignore")
    return shortened.rstrip("-") or "empty"


def picture_name(prompt: str, seed: int) -> str:
    """File name of one picture: `a-red-circle-7.png` for "A red circle!" and seed 7."""
    return f"{slug(prompt)}-{seed}.png"


def prepare_output(output: Path | None) -> tuple[Path, str | None]:
    """The folder to write to, made if missing, and the file name asked for, or None where names come from prompts.

    Raises ValueError if `output` names a file that is no PNG, or lies below something that is no folder.
    """
    if output is None:
        return Path(), None
    is_file = output.suffix.lower() == ".png" and not output.is_dir()
    if output.suffix.lower() in _OTHER_FORMATS and not output.is_dir():
        raise ValueError(f"pictures are written as PNG: --output must be a folder or end in .png, got {output}")
    folder = output.parent if is_file else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--output must lie in a folder, but part of {folder} is a file") from None
    return folder, output.name if is_file else None


def save_new(image: "Image", path: Path, text: "PngInfo") -> Path:
    """Writes a PNG with its text chunks under `path`, or `path` with -2, -3, … where that is taken; returns the name.

    The picture is written beside its place and moved there whole, so an interruption leaves no part of a file.
    """
    partial = path.with_name(f".{token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:
            image.save(stream, format="PNG", pnginfo=text)
        return _move_to_free_name(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _move_to_free_name(partial: Path, path: Path) -> Path:
    for name in _numbered(path):
        try:
            name.touch(exist_ok=False)  # takes the name, so two runs at once cannot choose the same
        except FileExistsError:
            continue
        try:
            partial.replace(name)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        return name
    raise AssertionError("count() has no end")


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
