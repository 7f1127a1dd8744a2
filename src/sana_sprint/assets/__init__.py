"""The embedded checkpoint and its ControlNet: the paths of small folders that are installed with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "shapes-base"
_CONTROL_FOLDER = Path(__file__).parent / "shapes-control"


def embedded_checkpoint() -> Path:
    """The folder of the embedded checkpoint, in diffusers layout, trained by this repository on drawn shapes.

    Raises FileNotFoundError where the package was installed without its data files.
    """
    if not (_FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded checkpoint is missing: {_FOLDER} holds no model_index.json; install the package again, "
            "or train it with: sana-sprint train shapes"
        )
    return _FOLDER


def embedded_controlnet() -> Path:
    """The folder of a ControlNet for the embedded checkpoint, which follows edges, in diffusers' layout.

    Raises FileNotFoundError where the package was installed without it.
    """
    if not (_CONTROL_FOLDER / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded ControlNet is missing: {_CONTROL_FOLDER} holds no config.json; name another one, or train it"
            " with: sana-sprint train shapes_control"
        )
    return _CONTROL_FOLDER
