"""The name of a kind of control to the function that makes it of a picture."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image

from sana_sprint.conditioning.drawing import scribble, soft_edges
from sana_sprint.conditioning.edges import edges
from sana_sprint.conditioning.networks import depth, hed
from sana_sprint.conditioning.pictures import Picture

# Each makes a picture in RGB, of the size of the one it is given.
CONTROLS: dict[str, Callable[[Picture], Image.Image]] = {
    "edges": edges,
    "scribble": scribble,
    "soft_edges": soft_edges,
    "depth": depth,
    "hed": hed,
}


_BY_NETWORK = ("depth", "hed")


def control_named(name: str, device: str | torch.device | None = None) -> Callable[[Picture], Image.Image]:
    """The function of this name in `CONTROLS`; one that runs a network runs it on the device, None for the CPU.

    Raises:
        ValueError: for another name.
    """
    if name not in CONTROLS:
        raise ValueError(f"no control is named {name!r}; there are {', '.join(CONTROLS)}")
    function: Callable[..., Image.Image] = CONTROLS[name]
    return function if device is None or name not in _BY_NETWORK else partial(function, device=device)
