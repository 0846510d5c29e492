"""The links of the documents lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def anchors(document: Path) -> list[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_guide_lists_its_sections_in_their_order():
    guide = ROOT / "GUIDE.md"
    listed = re.findall(r"^- \[.*\]\(#(.*)\)$", guide.read_text(), re.MULTILINE)
    assert listed == anchors(guide)[1:]
