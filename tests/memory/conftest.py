"""Networks on the meta device, the embedded checkpoint's and the published model's; ControlNets for the former."""

from pathlib import Path

import pytest
import torch
from tiny_control import open_control

from sana_sprint import SanaControlNetModel, SanaMultiControlNetModel, SanaTransformer2DModel, embedded_checkpoint
from sana_sprint.memory.configs import PUBLISHED, read_configs
from sana_sprint.memory.stages import Networks, Workload


@pytest.fixture(scope="session")
def small() -> Networks:
    """Of the embedded checkpoint, which draws 64 pixels."""
    return Networks(read_configs(embedded_checkpoint()), Workload(height=64, width=64))


@pytest.fixture(scope="session")
def sprint() -> Networks:
    """Of Sprint 1.6B, for one picture of 1024 pixels."""
    return Networks(read_configs(next(iter(PUBLISHED))), Workload())


@pytest.fixture(scope="session")
def transformer() -> SanaTransformer2DModel:
    """The embedded checkpoint's, with its weights; not to be altered."""
    return SanaTransformer2DModel.from_pretrained(
        embedded_checkpoint(), subfolder="transformer", torch_dtype=torch.bfloat16
    )


@pytest.fixture(scope="session")
def control_folders(transformer, tmp_path_factory) -> dict[str, Path]:
    """ControlNets for it, as if they had learnt something: one of either placement, and both as one network."""
    nets = {placement: open_control(transformer, residual_placement=placement) for placement in ("after", "before")}
    folders = {}
    models: dict[str, SanaControlNetModel | SanaMultiControlNetModel] = {
        **nets,
        "both": SanaMultiControlNetModel.from_controlnets(list(nets.values())),
    }
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("controlnets") / name
        model.save_pretrained(folders[name])
    return folders
