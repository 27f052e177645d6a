"""Builds the docs site into target/site, and checks it.

usage: [SITE_URL=https://...] python tools/docs_site.py

SITE_URL is the address where the site is to be served. Only the "not found" page depends on it: a server shows that at
any address, so its links begin at the server's root. Without SITE_URL the site is at the root.

Any warning fails: a broken link or reference in a page, or a docstring that griffe cannot read. The built pages are
then checked as a browser sees them: every local address leads to a file of the site, with the anchor that it names, and
nothing is loaded from another host.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

PROJECT = Path(__file__).resolve().parent.parent
SITE = PROJECT / "target" / "site"
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
"""What a browser loads without being asked; it follows links only when clicked."""
FOREIGN = re.compile(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')]+)""")
"""What a style loads from another host."""


class Config(yaml.SafeLoader):
    """Reads mkdocs.yml, where `!ENV` takes a value from the environment."""


Config.add_constructor("!ENV", lambda _loader, _node: None)


class Page(HTMLParser):
    """The anchors of a page, and the addresses in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: list[tuple[str, str, str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the anchor and the addresses of an element."""
        for name, value in attrs:
            if value is not None and (name == "id" or (tag, name) == ("a", "name")):
                self.anchors.add(value)
            elif value is not None and name in {"href", "src", "data"}:
                self.addresses.append((tag, name, value))


def build() -> list[str]:
    """Builds the site. Returns the warnings."""
    done = subprocess.run(  # noqa: S603
        [Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    told = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).split("Traceback")[0]
    if done.returncode:
        return [told]
    return [line for line in told.splitlines() if "griffe:" in line]


def unlisted(project: Path) -> list[str]:
    """Pages that the navigation lacks, and entries of the navigation that are no pages."""
    config = yaml.load((project / "mkdocs.yml").read_text(), Config)  # noqa: S506 (a SafeLoader)
    listed = set(entries(config["nav"]))
    pages = {str(page.relative_to(project / "docs")) for page in (project / "docs").rglob("*.md")}
    return [
        *(f"mkdocs.yml: the navigation lacks {page}" for page in sorted(pages - listed)),
        *(f"mkdocs.yml: there is no docs/{page}" for page in sorted(listed - pages)),
    ]


def entries(nav: object) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(nav, dict):
        nav = list(nav.values())
    return [page for part in nav for page in entries(part)] if isinstance(nav, list) else [str(nav)]


def problems(site: Path) -> list[str]:
    """Everything that is wrong with the addresses in the built pages and styles."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = [
        f"{path.relative_to(site)}: {address} {problem}"
        for path, page in pages.items()
        for tag, name, address in page.addresses
        if (problem := wrong(site, path, (tag, name), address, pages))
    ]
    return found + [
        f"{sheet.relative_to(site)}: {address} is loaded from another host"
        for sheet in sorted(site.rglob("*.css"))
        for address in FOREIGN.findall(sheet.read_text())
    ]


def wrong(site: Path, path: Path, place: tuple[str, str], address: str, pages: dict[Path, Page]) -> str | None:
    """What is wrong with an address in a page."""
    url = urlsplit(address)
    if url.scheme or url.netloc:
        names_a_page = place[0] == "link" and not address.endswith((".css", ".js", ".woff2"))
        loaded = place in LOADED and url.scheme != "data" and not names_a_page
        return "is loaded from another host" if loaded else None
    target = path if not url.path else (path.parent / unquote(url.path)).resolve()
    root = urlsplit(os.environ.get("SITE_URL", "")).path.rstrip("/") + "/"
    if path.name == "404.html" and url.path.startswith(root):
        target = site / unquote(url.path.removeprefix(root))
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return "leads nowhere"
    if url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
        return "leads to an anchor that is not there"
    return None


def main() -> int:
    """Builds and checks. Returns the exit status."""
    found = unlisted(PROJECT) + build()
    if not found:
        found = problems(SITE)
    for problem in found:
        sys.stderr.write(f"{problem}\n")
    if not found:
        sys.stdout.write(f"{SITE / 'index.html'}\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
