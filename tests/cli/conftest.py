"""The tiny pipeline as a folder, as a user of the command has a model, and `generate` with it."""

import pytest
from tiny_control import open_control

from sana_sprint.cli.main import main


@pytest.fixture(scope="session")
def model_folder(tiny_pipeline_parts, tmp_path_factory) -> str:
    """Path of a saved SanaSprintPipeline of tiny random components that draws 64 pixels."""
    from sana_sprint import SanaSprintPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    SanaSprintPipeline(**tiny_pipeline_parts).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def flow_folder(tiny_pipeline_parts, tmp_path_factory) -> str:
    """Path of the same pipeline with a flow-matching scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from sana_sprint import SanaSprintPipeline

    folder = tmp_path_factory.mktemp("models") / "flow"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    SanaSprintPipeline(**{**tiny_pipeline_parts, "scheduler": scheduler}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generate(model_folder, tmp_path, monkeypatch, capsys):
    """Runs `generate` with the tiny model in an empty folder; returns the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        if not {"--like", "--model"} & set(arguments):
            arguments = (*arguments, "--model", model_folder)
        code = main(["generate", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def control_folder(tiny_pipeline_parts, tmp_path_factory) -> str:
    """Path of a ControlNet for the tiny model, with its ways open."""
    folder = tmp_path_factory.mktemp("controlnets") / "tiny"
    open_control(tiny_pipeline_parts["transformer"]).save_pretrained(folder)
    return str(folder)
