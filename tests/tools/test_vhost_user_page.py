"""The snippets of docs/vhost-user.md run in order, and print what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from needs import need_program

PROJECT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(python|output)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_snippets_print_what_the_page_shows(tmp_path: Path) -> None:
    need_program("qemu-storage-daemon")
    fences = FENCE.findall((PROJECT / "docs" / "vhost-user.md").read_text())
    code = "".join(text for kind, text in fences if kind == "python")
    shown = "".join(text for kind, text in fences if kind == "output")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT / "examples")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown
