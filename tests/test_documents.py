"""What the documents promise of the repository itself: links lead somewhere, the README stays short."""

import re
from pathlib import Path

import pytest
from support import ROOT

DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")) if "node_modules" not in path.parts)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def headings(document: Path) -> set[str]:
    """The anchors that a hosting site makes of the headings."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_between_documents_leads_to_a_file_and_a_heading_that_are_there(document):
    for target in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in headings(path), f"{document.name} links to {target}: {sorted(headings(path))}"


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000
