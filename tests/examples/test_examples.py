"""The examples run as `examples/README.md` says, and print what it shows. Tests of the lab run those that need it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need, need_program

PROJECT = Path(__file__).parents[2]
README = PROJECT / "examples" / "README.md"
EXAMPLES = dict(re.findall(r"^```console\n\$ python (.*)\n((?:.*\n)*?)```$", README.read_text(), re.MULTILINE))
PROGRAMS = {"-m examples.vhost_user_blk": "qemu-storage-daemon"}
"""What an example needs."""
ON_KVM = ["examples/minimal_device.py", "examples/async_device.py", "-m examples.vhost_user_blk"]


def output(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_its_readme_shows(example: str) -> None:
    if example in PROGRAMS:
        need_program(PROGRAMS[example])
    assert output(*example.split()) == EXAMPLES[example]


@pytest.mark.parametrize("example", ON_KVM)
def test_an_example_prints_the_same_on_kvm(example: str) -> None:
    need("kvm")
    if example in PROGRAMS:
        need_program(PROGRAMS[example])
    assert output(*example.split(), "kvm") == EXAMPLES[example]


def test_the_readme_lists_every_example() -> None:
    there = {path.name for path in README.parent.iterdir()} - {README.name, "__pycache__"}
    listed = {name.rstrip("/") for name in re.findall(r"^\| `(\S+)` \|", README.read_text(), re.MULTILINE)}
    assert listed == there
    assert len(EXAMPLES) >= 3


def test_the_site_shows_every_source() -> None:
    sources = {str(path.relative_to(PROJECT)) for path in README.parent.rglob("*.py")}
    pages = "".join(page.read_text() for page in (PROJECT / "docs" / "examples").glob("*.md"))
    assert set(re.findall(r'^--8<-- "(\S+)"$', pages, re.MULTILINE)) == sources
