"""What a release says of itself, and the README that a package index shows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mshv_irqfd
import pytest

ROOT = Path(__file__).parents[2]
HERE = "https://files.example/at/v1"


@pytest.fixture(scope="module")
def release() -> Any:
    source = ROOT / "tools" / "release.py"
    if not source.exists():
        pytest.skip("needs the project's tree, beside the tests: tools/release.py")
    spec = importlib.util.spec_from_file_location("release", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_that_of_the_crate_everywhere(release: Any) -> None:
    version = release.version()
    shown = subprocess.run(
        [sys.executable, "-m", "mshv_irqfd._cli", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert mshv_irqfd.__version__ == version
    assert importlib.metadata.version("mshv_irqfd") == version
    assert shown.stdout.split()[1:] == [version]


def test_the_changelog_has_a_section_for_the_version(release: Any) -> None:
    release.check_changelog()


def test_without_the_files_beside_it_the_readme_links_to_none(release: Any) -> None:
    text = "![a plot](docs/a.svg) and [docs/a.md](docs/a.md), [more](docs/b.md#part), [there](https://x.example/y)"
    assert release.standalone(text, None) == (
        "*(Picture: a plot.)* and docs/a.md, more (`docs/b.md#part`), [there](https://x.example/y)"
    )


def test_with_an_address_the_readmes_links_and_pictures_are_below_it(release: Any) -> None:
    text = "![a plot](docs/a.svg), [more](docs/b.md#part), [there](https://x.example/y), [below](#part)"
    assert release.standalone(text, f"{HERE}/") == (
        f"![a plot]({HERE}/docs/a.svg), [more]({HERE}/docs/b.md#part), [there](https://x.example/y), [below](#part)"
    )


def test_every_file_that_the_readme_links_to_exists(release: Any) -> None:
    linked = re.findall(rf"\]\({HERE}/([^)#]+)", release.standalone((ROOT / "README.md").read_text(), HERE))
    assert linked
    assert [name for name in linked if not (ROOT / name).exists()] == []
