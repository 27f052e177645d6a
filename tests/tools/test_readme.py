"""The README's examples run as written and print the output shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("example", "output"), EXAMPLES, ids=["routes", "devices"])
def test_an_example_prints_what_the_readme_shows(example: str, output: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == output


@pytest.mark.parametrize(("example", "output"), EXAMPLES, ids=["routes", "devices"])
def test_an_example_is_no_longer_than_twenty_lines_of_code(example: str, output: str) -> None:
    assert sum(bool(line.strip()) for line in example.split("\n")) <= 20
    assert output
