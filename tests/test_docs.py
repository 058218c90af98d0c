"""docs/: what the pages tell a reader to run is run, and the README says no more than is there."""

import re

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
# A block of `py` instead of `python` needs what a test has not: files, hours.
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if "```python\n" in path.read_text() and path.stem != "extending"
)


def blocks(page) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), space)


def test_every_tutorial_has_something_to_run():
    tutorials = {path.stem for path in (DOCS / "tutorials").glob("*.md")}
    run = {page.stem for page in PAGES}
    assert {"own_mlp", "vision", "language", "evidence"} == tutorials & run
    assert tutorials - run == {"many_machines"}  # its commands: tests/test_launch.py


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"^([\w/.-]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert listed == pages - {"index"}


def test_links_between_pages_lead_somewhere():
    """Also outside docs/, which Sphinx does not read."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
