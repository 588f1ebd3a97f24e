"""What the pages promise: one an op and one a method, links that lead somewhere, commands that exist."""

import re
from pathlib import Path

import pytest

import otkd_fast
from otkd_fast import losses

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("name", [n for n in otkd_fast.__all__ if n not in ("__version__", "losses")])
def test_every_public_name_has_a_page(name):
    assert any(re.search(rf"auto(function|class):: {name}$", p.read_text(), re.M) for p in (DOCS / "ops").glob("*.md"))


@pytest.mark.parametrize("name", losses.__all__)
def test_every_loss_has_a_page(name):
    pages = (DOCS / "methods").glob("*.md")
    assert any(re.search(rf"auto(function|class):: {name}$", page.read_text(), re.M) for page in pages)


@pytest.mark.parametrize("page", sorted((DOCS / "ops").glob("*.md")), ids=lambda p: p.stem)
def test_every_op_page_answers_the_same_questions(page):
    text = page.read_text()
    if page.stem == "backends":
        return
    for heading in ("## Problem", "## What to expect", "## Example", "## Backends", "## Reference"):
        assert heading in text
    for row in ("dtypes", "gradients", "numerics", "operations", "bytes"):
        assert f"| {row} |" in text
    assert ">>> " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), re.M)) <= targets
