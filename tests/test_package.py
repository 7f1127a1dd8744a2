"""What importing and installing the package promises: lazy names, no side effects, data files."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sana_sprint

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> str:
    """Output of a fresh interpreter with the package on its path."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & {name.split('.')[0] for name in sys.modules}"
    assert run_python(f"import sana_sprint, sana_sprint.assets; dir(sana_sprint); print({heavy} or 'none')") == "none"


def test_every_public_name_leads_to_an_object_of_that_name():
    for name in set(sana_sprint.__all__) - {"__version__"}:
        assert getattr(sana_sprint, name).__name__ == name


def test_public_names_are_listed_before_they_are_imported():
    listed = run_python("import sana_sprint; print(*dir(sana_sprint))").split()
    assert set(sana_sprint.__all__) <= set(listed)


def test_names_for_type_checkers_are_the_names_that_are_loaded():
    source = Path(sana_sprint.__file__).read_text(encoding="utf-8")
    declared = {
        name.strip(): module
        for module, names in re.findall(r"^    from (sana_sprint\.\S+) import (.+)$", source, re.MULTILINE)
        for name in names.split(",")
    }
    assert declared == sana_sprint._HOMES
    assert {*declared, "__version__"} == set(sana_sprint.__all__)


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="SanaSprintPipelin"):
        _ = sana_sprint.SanaSprintPipelin


def test_importing_the_package_leaves_diffusers_as_it_was():
    code = """
import diffusers
before = {name: getattr(diffusers, name) for name in ("SanaTransformer2DModel", "AutoencoderDC", "SCMScheduler")}
import sana_sprint
sana_sprint.SanaSprintPipeline
print(all(getattr(diffusers, name) is value for name, value in before.items()))
"""
    assert run_python(code) == "True"


def test_the_embedded_checkpoint_is_a_pipeline_folder_of_at_most_12_megabytes():
    try:
        folder = sana_sprint.embedded_checkpoint()
    except FileNotFoundError:
        pytest.skip("the embedded checkpoint is not trained yet")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= 12e6


def test_the_embedded_controlnet_adds_at_most_4_megabytes():
    try:
        folder = sana_sprint.embedded_controlnet()
    except FileNotFoundError:
        pytest.skip("the embedded ControlNet is not trained yet")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 4e6


def test_a_missing_embedded_checkpoint_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("sana_sprint.assets._FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="sana-sprint train shapes"):
        sana_sprint.embedded_checkpoint()


def test_every_file_of_the_embedded_checkpoint_is_installed_with_the_package():
    endings = re.search(r"for ending in \(([^)]*)\)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert endings is not None
    installed = {f".{ending}" for ending in re.findall(r'"(\w+)"', endings[1])} | {".py"}
    assets = (ROOT / "src" / "sana_sprint" / "assets").rglob("*")
    left_out = [path.name for path in assets if path.is_file() and path.suffix not in installed | {".pyc"}]
    assert not left_out


def test_constraints_are_exact_and_name_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned["torch"] == "2.13.0"
    assert not [version for version in pinned.values() if not re.fullmatch(r"[0-9][0-9a-z.]*", version)]
    wanted = re.findall(r'"([A-Za-z][\w-]*)[<>=]=', (ROOT / "setup.py").read_text(encoding="utf-8"))
    normal = {name.lower().replace("_", "-") for name in pinned}
    assert {name.lower().replace("_", "-") for name in wanted} <= normal


def test_pyproject_holds_the_build_system_and_tool_settings_only():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")).keys() == {"build-system", "tool"}
