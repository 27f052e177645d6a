"""Every snippet of the README and of the docs runs as written, and prints the output shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
RUNNER = PROJECT / "tests" / "helpers" / "page.py"
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def run(page: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # From Python 3.12 on, a fork beside other threads warns: the page on forks says so.
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", RUNNER, page],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def name(page: Path) -> str:
    """The name of a page. The lab runs what has mshv in its name."""
    needs_mshv = "<!-- needs: mshv -->" in page.read_text()
    return str(page.relative_to(PROJECT)) + (" on mshv" if needs_mshv else "")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_snippet_of_a_page_runs_and_prints_what_is_shown(page: Path, tmp_path: Path) -> None:
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_example_of_the_readme_is_no_longer_than_twenty_lines_of_code() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert 0 < sum(bool(line.strip()) for line in example.split("\n")) <= 20


def test_the_kernel_facts_are_the_rows_of_the_probe() -> None:
    subprocess.run([sys.executable, PROJECT / "tools" / "kernel_facts.py", "--check"], check=True)


WRONG = {
    "python that raises": "```python\n1 / 0\n```\n",
    "another output": "```python\nprint(1)\n```\n\n```output\n2\n```\n",
    "an output that is not shown": "```python\nprint(1)\n```\n",
    "a command that fails": "```console\n$ false\n```\n",
    "a command with another output": "```console\n$ echo 1\n2\n```\n",
    "a file that is no JSON": "```json\n{\n```\n",
    "an unknown language": "```ruby\ntrue\n```\n",
    "an unknown verb in a shell": "```sh\nmake nothing  # at all\n```\n",
    "no language": "```\ntrue\n```\n",
    "an unknown verb": "<!-- in: Makefile -->\n```console\n$ make nothing\n```\n",
    "an unknown command": "<!-- in: Makefile -->\n```console\n$ nothing at all\n```\n",
    "an unclosed partition": "```python\nimport mshv_irqfd\nmshv_irqfd.open_partition('simulated')\n```\n",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_snippet_is_noticed(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{WRONG[wrong]}")
    done = run(page, tmp_path)
    assert done.returncode != 0 or done.stderr != "", wrong


def test_snippets_of_a_page_share_names_and_files(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="two.py"\nprint(2)\n```\n\n```console\n$ python two.py\n2\n```\n\n'
        '```python\none = 1\n```\n\n```python\nprint(one, "and more")\n```\n\n```output\n1 ...\n```\n'
    )
    done = run(page, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
