"""A drawing and the ControlNet that follows it, as a user names them, to what the pipelines take."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli.arguments import NO_CONTROL
from sana_sprint.cli.inputs import Input, choose_input
from sana_sprint.cli.model import EMBEDDED, Model, digest, find_folder
from sana_sprint.cli.records import InputFile, Settings

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

DEFAULT_CONTROL, DEFAULT_SCALE = "edges", 1.0

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model*"
_TRIAL_SIZE = (64, 64)  # pixels


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A drawing to follow, or a picture to find it in, and the ControlNet that follows it."""

    image: Input
    control: str  # what is found in the picture; NO_CONTROL: it is the drawing
    controlnet: str
    scale: float

    def drawing(self, size: tuple[int, int], device: "torch.device | None" = None) -> "Image":
        """What the ControlNet is shown of this width and height in pixels, in RGB; None finds it on the CPU.

        Lines are found in the picture as large as what is drawn, as in training: they are as broad there as here.

        Raises ValueError for a picture that is transparent in places or has more than 8 bits for each colour, and
        ImportError if the control needs a package that is not installed.
        """
        from PIL.Image import Resampling

        from sana_sprint.conditioning.pictures import read_picture
        from sana_sprint.conditioning.table import control_named

        try:
            picture = read_picture(self.image.image)
        except ValueError as error:
            raise ValueError(f"{self.image.file.path}: {error}") from None
        picture = picture.resize(size, Resampling.LANCZOS)
        return picture if self.control == NO_CONTROL else control_named(self.control, device)(picture)

    def files(self) -> dict[str, InputFile | None]:
        """The file under the name that `Settings` has for it."""
        return {"control_image": self.image.file}

    def settings(self) -> dict[str, Any]:
        """Those of `Settings` that are known before the ControlNet is found."""
        return {
            **self.files(),
            "control": self.control,
            "controlnet": self.controlnet,
            "control_scale": self.scale,
        }


def choose_guide(
    control_image: Path | None,
    control: str | None,
    controlnet: str | None,
    scale: float | None,
    model: str,
    like: Settings | None,
) -> Guide | None:
    """What to follow, the options given completed by those that `like` stored; None for the prompt alone.

    Raises OSError if the file cannot be read, ImportError if the control needs a package that is not installed, and
    ValueError if the file holds no picture that a ControlNet can be shown, or if an option is missing.
    """
    image = choose_input("--control-image", control_image, like.control_image if like else None)
    if image is None:
        for option, value in (("--control", control), ("--controlnet", controlnet), ("--control-scale", scale)):
            if value is not None:
                raise ValueError(f"{option} needs --control-image: without one, there is nothing to follow")
        return None
    if like is not None:
        control = like.control if control is None else control
        controlnet = like.controlnet if controlnet is None else controlnet
        scale = like.control_scale if scale is None else scale
    if controlnet is None:
        own = Path(model).expanduser() / "controlnet"
        if model != EMBEDDED and not own.is_dir():
            raise ValueError(f"--control-image needs --controlnet, a folder or a hub id: there is none for {model}")
        controlnet = EMBEDDED if model == EMBEDDED else str(own)
    guide = Guide(
        image=image,
        control=DEFAULT_CONTROL if control is None else control,
        controlnet=controlnet,
        scale=DEFAULT_SCALE if scale is None else scale,
    )
    guide.drawing(_TRIAL_SIZE)  # raises what it will raise in full size, before a model is looked for
    return guide


def find_controlnet(name: str) -> Model:
    """The folder of a ControlNet behind a name: `embedded`, a folder, or a hub id, which is fetched.

    Raises ValueError if a folder holds no ControlNet and OSError if there is no such folder or ControlNet.
    """

    def embedded() -> Path:
        from sana_sprint.assets import embedded_controlnet

        return embedded_controlnet()

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS])

    folder = find_folder(name, "--controlnet", "ControlNet", embedded, fetch)
    _check_is_controlnet(name, folder / _CONFIG)
    return Model(name=name, folder=folder, fingerprint=digest([folder / _CONFIG, *sorted(folder.glob(_WEIGHTS))]))


def _check_is_controlnet(name: str, config: Path) -> None:
    # diffusers would read another network's folder too, and leave to chance what it does not find there.
    if not config.is_file():
        raise ValueError(f"{name} is no folder of a ControlNet: it holds no {_CONFIG}")
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{config} is not the config of a network") from None
    if kind != "SanaControlNetModel":
        raise ValueError(f"{name} holds a {kind}, and --controlnet takes a SanaControlNetModel")
