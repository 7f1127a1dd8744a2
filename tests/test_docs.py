"""What the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]


def test_every_test_that_conformance_names_exists():
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    functions, files = set(re.findall(r"`(test_\w+)`", text)), set(re.findall(r"`(\w+/test_\w+\.py)`", text))
    assert functions
    assert not {name for name in functions if f"def {name}(" not in sources}
    assert not {name for name in files if not (ROOT / "tests" / name).is_file()}
