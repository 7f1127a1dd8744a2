"""The rules of architecture and style that a machine can hold: import directions, file lengths, the README's tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sana_sprint

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sana_sprint"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports from lower ranks or from its own folder. The embedded checkpoint is data, so everyone may ask for it.
RANKS = {
    "assets": 0,
    "layers": 0,
    "plugin": 0,
    "sizes": 0,
    "files": 0,
    "pictures": 0,
    "text": 1,
    "transformer": 1,
    "trigflow": 1,
    "autoencoder": 1,
    "shapes": 1,
    "conditioning": 1,
    "checkpoints": 2,
    "evaluation": 2,
    "quantisation": 2,
    "pipelines": 3,
    "training": 3,
    "memory": 4,
    "bench": 5,
    "serving": 5,
    "cli": 6,
}

# Parts of diffusers without documentation, which change without notice.
INTERNALS = (
    "diffusers.pipelines.pipeline_loading_utils",
    "diffusers.pipelines.auto_pipeline",
    "diffusers.loaders.single_file_utils",
    "diffusers.models.model_loading_utils",
    "diffusers.utils.import_utils",
)


def part_of(path: Path) -> str:
    """The name in RANKS that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> tuple[str, ...]:
    return ("sana_sprint", *path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and full dotted name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module_of(path)[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def our_imports() -> Iterator[tuple[Path, int, str]]:
    """Every import of one part of the package by a file: the file, the line and the part, public names resolved."""
    for path in FILES:
        for line, name in imports_of(path):
            package, *parts = name.split(".")
            if package == "sana_sprint" and parts and parts[0] != "__version__":
                yield path, line, sana_sprint._HOMES.get(parts[0], name).split(".")[1]


def test_every_folder_has_a_rank():
    assert {part_of(path) for path in FILES} - {"__init__", "__main__"} <= RANKS.keys()


def test_a_file_imports_only_from_lower_ranks_or_its_own_folder():
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for path, line, imported in our_imports()
        if part_of(path) not in ("__init__", imported) and RANKS[imported] >= RANKS[part_of(path)]
    ]
    assert not upward


def test_no_file_is_longer_than_500_lines():
    files = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_only_the_plugin_reaches_into_diffusers_internals():
    reaching = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        for line, name in imports_of(path)
        if name.split(".")[0] == "diffusers"
        and (name.startswith(INTERNALS) or any(part.startswith("_") for part in name.split(".")))
        and part_of(path) != "plugin"
    ]
    assert not reaching


def opening_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def test_every_file_opens_with_one_sentence_that_says_what_it_is():
    one_sentence_and_perhaps_a_legend = re.compile(r"\S[^\n]*\.(\n\n.*)?", re.DOTALL)
    wanting = [path for path in FILES if not one_sentence_and_perhaps_a_legend.fullmatch(opening_of(path))]
    assert not wanting


def tree_of(document: Path) -> str:
    """The drawn tree of a document: its code block with a line for src/sana_sprint."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    return next((block for block in blocks if "src/sana_sprint" in block), "")


def test_the_readme_lists_every_folder_and_top_level_file_of_the_package():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    tree = tree_of(readme)
    listed = set(re.findall(r"^[│├└─ ]*([\w.]+)/?(?= |$)", tree, re.MULTILINE))
    existing = {part_of(path) if path.parent != PACKAGE else path.name for path in FILES}
    assert existing - listed == {"__init__.py"}
