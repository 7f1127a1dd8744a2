"""A picture in a file or a shard to its size, and to an array of the size that its batch has."""

import numpy as np
from PIL import Image, ImageOps
from PIL.ContainerIO import ContainerIO

from sana_sprint.pictures import open_picture, upright_size
from sana_sprint.training.datasets.records import Span


def picture_size(span: Span) -> tuple[int, int]:
    """Height and width as the picture is looked at, from its header alone.

    Raises:
        ValueError: if that is no picture, and other errors for some kinds of damage.
    """
    with span.path.open("rb") as stream, open_picture(ContainerIO(stream, span.offset, span.size)) as image:
        return upright_size(image)[::-1]


def fit_picture(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The picture (height, width, 3) uint8: resized to cover that size, bicubic, and cropped around the middle."""
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
