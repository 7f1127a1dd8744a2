"""The embedded checkpoint: the path of a small pipeline folder that is installed with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "shapes-base"


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
