"""The tiny pipeline as a folder, as a user of the command has a model."""

import pytest


@pytest.fixture(scope="session")
def model_folder(tiny_pipeline_parts, tmp_path_factory) -> str:
    """Path of a saved SanaSprintPipeline of tiny random components that draws 64 pixels."""
    from sana_sprint import SanaSprintPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(folder)
    return str(folder)
