"""The check of the docs site notices what a reader would stumble over."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.thread_unsafe(reason="the threads would share the files of the site")

TOOL = Path(__file__).parents[2] / "tools" / "docs_site.py"
spec = importlib.util.spec_from_file_location("docs_site", TOOL)
assert spec is not None
assert spec.loader is not None
docs_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_site)

GOOD = """
<link rel="canonical" href="https://example.org/page.html"><link rel="stylesheet" href="style.css">
<h1 id="top">A page</h1><a href="#top">here</a> <a href="other/page.html#part">there</a>
<a href="https://example.org/">elsewhere</a> <img src="data:image/png;base64,AAAA">
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    (tmp_path / "style.css").touch()
    (tmp_path / "other" / "page.html").write_text('<h2 id="part">A part</h2><a href="../page.html#top">back</a>')
    (tmp_path / "page.html").write_text(GOOD)
    return tmp_path


def test_a_site_whose_links_lead_somewhere_is_in_order(site: Path) -> None:
    assert docs_site.problems(site) == []


@pytest.mark.parametrize(
    ("element", "problem"),
    [
        ('<a href="gone.html">', "leads nowhere"),
        ('<a href="other/page.html#gone">', "not there"),
        ('<a href="#gone">', "not there"),
        ('<img src="gone.svg">', "leads nowhere"),
        ('<script src="https://example.org/script.js"></script>', "another host"),
        ('<link rel="stylesheet" href="https://example.org/font.css">', "another host"),
        ('<img src="//example.org/picture.png">', "another host"),
    ],
)
def test_a_bad_address_is_noticed(site: Path, element: str, problem: str) -> None:
    (site / "page.html").write_text(GOOD + element)
    (found,) = docs_site.problems(site)
    assert problem in found


def test_the_page_of_a_server_for_unknown_addresses_has_links_from_the_root_of_the_site(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_URL", "https://example.org/project/")
    (site / "404.html").write_text('<a href="/project/page.html#top">a page</a> <a href="/page.html">outside</a>')
    (found,) = docs_site.problems(site)
    assert "404.html: /page.html leads nowhere" in found
    monkeypatch.delenv("SITE_URL")
    (found,) = docs_site.problems(site)
    assert "404.html: /project/page.html#top leads nowhere" in found


@pytest.mark.parametrize("rule", ['@import "https://example.org/a.css";', "a { background: url(//example.org/a.png) }"])
def test_a_style_from_another_host_is_noticed(site: Path, rule: str) -> None:
    (site / "style.css").write_text(rule)
    (found,) = docs_site.problems(site)
    assert "another host" in found


def test_a_page_outside_the_navigation_and_a_missing_page_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "docs" / "part").mkdir(parents=True)
    for page in ("index.md", "part/lost.md"):
        (tmp_path / "docs" / page).touch()
    (tmp_path / "mkdocs.yml").write_text("nav:\n  - index.md\n  - Part:\n      - Gone: part/gone.md\n")
    assert docs_site.unlisted(tmp_path) == [
        "mkdocs.yml: the navigation lacks part/lost.md",
        "mkdocs.yml: there is no docs/part/gone.md",
    ]


def test_every_page_of_the_docs_is_in_the_navigation() -> None:
    assert docs_site.unlisted(TOOL.parents[1]) == []
