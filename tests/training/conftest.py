"""A tiny teacher as a pipeline folder, and latents that its own encoders have made."""

import pytest


@pytest.fixture(scope="session")
def teacher_folder(tiny_pipeline_parts, tmp_path_factory):
    """A pipeline of a flow model that can be distilled."""
    from tiny_distillation import save_teacher

    return save_teacher(tiny_pipeline_parts, tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="session")
def cache_folder(teacher_folder, tmp_path_factory):
    """A cache of the latents and captions of six pictures."""
    from tiny_distillation import save_cache

    return save_cache(teacher_folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def controlled_cache_folder(teacher_folder, tmp_path_factory):
    """The same with latents of the pictures' edges."""
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'sana-sprint[control]'")
    from tiny_distillation import save_cache

    return save_cache(teacher_folder, tmp_path_factory.mktemp("controlled"), "--control", "edges")
