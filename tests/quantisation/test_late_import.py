"""bitsandbytes comes with the first use of it, not with the first model: in fresh processes, as a program begins."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def run_python(folder) -> Callable[[str], str]:
    """Runs a program where FOLDER is that of the transformer, and returns what it prints."""

    def run(program: str) -> str:
        opening = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); FOLDER = {str(folder)!r}\n"
        done = subprocess.run([sys.executable, "-c", opening + program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.parametrize("first", ["sana_sprint.SanaSprintPipeline", "sana_sprint.register()"])
def test_bitsandbytes_is_not_imported_until_somebody_uses_it(run_python, first):
    program = f"""
import sana_sprint
{first}
print("bitsandbytes" in sys.modules)
import diffusers
import diffusers.quantizers.bitsandbytes as theirs
import torch
print("bitsandbytes" in sys.modules)
layers = torch.nn.Sequential(torch.nn.Linear(8, 8))
config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
layers = theirs.replace_with_bnb_linear(layers, modules_to_not_convert=[], quantization_config=config)
used = sys.modules["bitsandbytes"]
import bitsandbytes
from bitsandbytes.nn import Linear8bitLt
print(bitsandbytes is used, type(layers[0]) is Linear8bitLt, theirs.utils.bnb.nn is bitsandbytes.nn)
"""
    assert run_python(program).splitlines() == ["False", "False", "True True True"]


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_a_model_is_quantised_after_that_as_ever(run_python, kind):
    program = f"""
from sana_sprint import SanaTransformer2DModel
from diffusers import BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_8bit={kind == "Linear8bitLt"}, load_in_4bit={kind == "Linear4bit"})
model = SanaTransformer2DModel.from_pretrained(FOLDER, quantization_config=config)
import bitsandbytes
print(isinstance(model.transformer_blocks[0].attn1.to_q, bitsandbytes.nn.{kind}))
"""
    assert run_python(program) == "True"


def test_what_was_imported_before_stays(run_python):
    program = """
import bitsandbytes
import sana_sprint
sana_sprint.SanaTransformer2DModel
from diffusers.quantizers.bitsandbytes import utils
print(sys.modules["bitsandbytes"] is utils.bnb is bitsandbytes)
"""
    assert run_python(program) == "True"


def test_a_name_that_needs_bitsandbytes_at_once_gets_it(run_python):
    program = """
import sana_sprint
sana_sprint.load_pipeline
from sana_sprint.quantisation.layers import Linear4bit
import bitsandbytes
print(issubclass(Linear4bit, bitsandbytes.nn.Linear4bit))
"""
    assert run_python(program) == "True"


def test_without_bitsandbytes_models_that_are_not_quantised_load(run_python):
    program = """
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "bitsandbytes" else super().find_spec(name, path, target)

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
import sana_sprint
sana_sprint.SanaTransformer2DModel.from_pretrained(FOLDER)
print("bitsandbytes" in sys.modules)
"""
    assert run_python(program) == "False"
