"""The embedded checkpoint's networks on the meta device, for a small picture and for the published model's."""

import pytest

from sana_sprint import embedded_checkpoint
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
