"""The README's example runs as written and prints the output shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_prints_what_the_readme_shows() -> None:
    example, output = re.findall(r"^```(?:python)?\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)[1:3]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == output


def test_the_example_is_no_longer_than_twenty_lines_of_code() -> None:
    example = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)[0]
    assert sum(bool(line.strip()) for line in example.split("\n")) <= 20
