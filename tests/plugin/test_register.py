"""`register` and `unregister`: what diffusers then gives, in any order of imports, and that nothing is left behind."""

import inspect
import logging
import sys
from importlib import import_module

import diffusers
import pytest

import sana_sprint

NAMES = (
    "AutoencoderDC",
    "SCMScheduler",
    "SanaControlNetModel",
    "SanaSprintImg2ImgPipeline",
    "SanaSprintPipeline",
    "SanaTransformer2DModel",
)
# Classes of ours that diffusers has none for.
ADDITIONS = (
    "SanaMultiControlNetModel",
    "SanaSprintControlNetImg2ImgPipeline",
    "SanaSprintControlNetPipeline",
    "SanaSprintInpaintPipeline",
)
AUTO_TABLES = (
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "AUTO_INPAINT_PIPELINES_MAPPING",
)

# For a fresh interpreter: asserts that every way to a class of diffusers leads to ours.
EVERY_WAY = f"""
import sana_sprint, diffusers, diffusers.models, diffusers.models.autoencoders, diffusers.models.transformers
import diffusers.pipelines, diffusers.pipelines.sana, diffusers.schedulers
from diffusers import AutoencoderDC, SCMScheduler, SanaSprintImg2ImgPipeline, SanaSprintPipeline
from diffusers import SanaControlNetModel, SanaSprintInpaintPipeline, SanaTransformer2DModel
from diffusers import SanaMultiControlNetModel, SanaSprintControlNetImg2ImgPipeline, SanaSprintControlNetPipeline
for name in {NAMES + ADDITIONS}:
    assert globals()[name] is getattr(diffusers, name) is getattr(sana_sprint, name), name
for module, name in [
    (diffusers.models, "AutoencoderDC"),
    (diffusers.models, "SanaControlNetModel"),
    (diffusers.models.controlnets, "SanaControlNetModel"),
    (diffusers.models, "SanaTransformer2DModel"),
    (diffusers.models.autoencoders, "AutoencoderDC"),
    (diffusers.models.transformers, "SanaTransformer2DModel"),
    (diffusers.schedulers, "SCMScheduler"),
    (diffusers.pipelines, "SanaSprintPipeline"),
    (diffusers.pipelines.sana, "SanaSprintPipeline"),
    (diffusers.pipelines.sana, "SanaSprintImg2ImgPipeline"),
]:
    assert getattr(module, name) is getattr(sana_sprint, name), (module, name)
loaded = [
    diffusers.DiffusionPipeline.from_pretrained(FOLDER),
    diffusers.AutoPipelineForText2Image.from_pretrained(FOLDER),
    diffusers.SanaSprintPipeline.from_pretrained(FOLDER),
]
loaded.append(diffusers.AutoPipelineForText2Image.from_pipe(loaded[0]))
for pipe in loaded:
    assert type(pipe) is sana_sprint.SanaSprintPipeline
    assert type(pipe.transformer) is sana_sprint.SanaTransformer2DModel
    assert type(pipe.vae) is sana_sprint.AutoencoderDC
    assert type(pipe.scheduler) is sana_sprint.SCMScheduler
for automatic, kind in [
    (diffusers.AutoPipelineForImage2Image, sana_sprint.SanaSprintImg2ImgPipeline),
    (diffusers.AutoPipelineForInpainting, sana_sprint.SanaSprintInpaintPipeline),
]:
    assert type(automatic.from_pretrained(FOLDER)) is kind
    other = automatic.from_pipe(loaded[0])
    assert type(other) is kind
    assert other.components == loaded[0].components
    assert type(diffusers.AutoPipelineForText2Image.from_pipe(other)) is sana_sprint.SanaSprintPipeline
    other.save_pretrained(FOLDER + kind.__name__)
    assert type(diffusers.DiffusionPipeline.from_pretrained(FOLDER + kind.__name__)) is kind
model = diffusers.AutoModel.from_pretrained(FOLDER, subfolder="transformer")
control = sana_sprint.SanaControlNetModel.from_transformer(model, num_layers=1)
for automatic, kind in [
    (diffusers.AutoPipelineForText2Image, sana_sprint.SanaSprintControlNetPipeline),
    (diffusers.AutoPipelineForImage2Image, sana_sprint.SanaSprintControlNetImg2ImgPipeline),
]:
    assert type(automatic.from_pretrained(FOLDER, controlnet=control)) is kind
assert type(model) is sana_sprint.SanaTransformer2DModel
print("ours by every way")
"""


def snapshot() -> dict:
    """Every class that a module of diffusers has a name for, its constructor's annotations, the automatic tables."""
    from diffusers.pipelines import auto_pipeline

    found = {table: dict(getattr(auto_pipeline, table)) for table in AUTO_TABLES}
    for module in [one for name, one in list(sys.modules.items()) if name.split(".")[0] == "diffusers"]:
        for name, value in list(vars(module).items()):
            if inspect.isclass(value):
                found[module.__name__, name] = value
                found[module.__name__, name, "init"] = dict(getattr(value.__init__, "__annotations__", {}))
    return found


@pytest.fixture
def registered():
    """Registers for one test."""
    sana_sprint.register()
    yield
    sana_sprint.unregister()


# B13 is among the ways
def test_registered_before_diffusers_is_imported_every_way_leads_to_our_classes(run_python):
    assert run_python(f"import sana_sprint; sana_sprint.register()\n{EVERY_WAY}") == "ours by every way"


def test_registered_after_diffusers_is_imported_every_way_leads_to_our_classes(run_python):
    program = f"""
from diffusers.models import AutoencoderDC
from diffusers.models.transformers import SanaTransformer2DModel
import diffusers.schedulers.scheduling_scm, diffusers.pipelines.sana.pipeline_sana_sprint_img2img
from diffusers import AutoPipelineForText2Image, SanaSprintPipeline
import sana_sprint
sana_sprint.register()
{EVERY_WAY}
"""
    assert run_python(program) == "ours by every way"


def test_unregister_without_register_does_not_even_import_diffusers(run_python):
    assert run_python("import sana_sprint; sana_sprint.unregister(); print('diffusers' in sys.modules)") == "False"


def test_importing_and_loading_a_pipeline_of_ours_changes_nothing_in_diffusers(folder):
    originals = {name: getattr(diffusers, name) for name in NAMES}
    before = snapshot()
    sana_sprint.SanaSprintPipeline.from_pretrained(folder)
    after = snapshot()
    assert {key for key in before if after[key] != before[key]} == set()
    assert not {getattr(sana_sprint, name) for name in NAMES} & set(originals.values())


def test_registering_twice_is_registering_once():
    before = snapshot()
    sana_sprint.register()
    once = snapshot()
    sana_sprint.register()
    assert snapshot() == once
    sana_sprint.unregister()
    after = snapshot()
    assert {key for key in before if after[key] != before[key]} == set()


def test_unregister_leaves_no_class_of_ours_in_diffusers(folder):
    sana_sprint.register()
    sana_sprint.unregister()
    sana_sprint.unregister()
    ours = {getattr(sana_sprint, name) for name in NAMES + ADDITIONS}
    assert not any(hasattr(diffusers, name) for name in ADDITIONS)
    assert [key for key, value in snapshot().items() if inspect.isclass(value) and value in ours] == []
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert {type(one) for one in (pipe, pipe.vae, pipe.transformer, pipe.scheduler)} & ours == set()


def test_what_diffusers_imports_while_registered_is_restored_too(registered, monkeypatch):
    name = "diffusers.pipelines.sana.pipeline_sana_controlnet"
    monkeypatch.delitem(sys.modules, name, raising=False)
    later = import_module(name)
    assert later.SanaTransformer2DModel is sana_sprint.SanaTransformer2DModel
    sana_sprint.unregister()
    assert later.SanaTransformer2DModel is not sana_sprint.SanaTransformer2DModel
    annotations = later.SanaControlNetPipeline.__init__.__annotations__
    assert annotations["transformer"] is later.SanaTransformer2DModel


def test_the_modules_that_define_the_classes_keep_their_own(registered):
    from diffusers.models.transformers import sana_transformer

    assert sana_transformer.SanaTransformer2DModel is not sana_sprint.SanaTransformer2DModel
    assert sana_transformer.SanaTransformer2DModel.__module__ == sana_transformer.__name__


def test_while_registered_diffusers_other_pipelines_take_our_components_quietly(registered, folder, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        flow = diffusers.SanaPipeline.from_pipe(pipe)
        other = diffusers.SanaSprintImg2ImgPipeline.from_pipe(pipe)
        assert type(other) is sana_sprint.SanaSprintImg2ImgPipeline
        diffusers.SanaPipeline.from_pretrained(folder)
    assert type(pipe) is sana_sprint.SanaSprintPipeline
    assert flow.transformer is other.transformer is pipe.transformer
    assert [record.getMessage() for record in caplog.records] == []
