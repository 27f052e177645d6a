"""Runs every snippet of a page of the docs, in the current directory, as its reader would: python page.py PAGE.

| fence | is |
|---|---|
| `python` | run, in one namespace for the whole page |
| `python title="NAME"`, and any other language with a title | written to the file NAME |
| `console` | run by a shell: what follows a `$ `, and the output shown below it is compared |
| `output` | compared with what the `python` block before it printed; `...` stands for anything |
| `json`, `toml` without a title | parsed |

A comment before a fence says what else it needs: `<!-- needs: kvm -->` runs it where that backend is. A command that
sets a machine up is not run again: `<!-- in: Makefile -->` demands that each command of the fence is in that file of the
project, or, for `make VERB`, that the verb exists. A measurement of minutes is run for an instant, on another backend:
`<!-- shortened: simulated -->`.
"""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import backends
from sybil import Document, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sybil import Example

PROJECT = Path(__file__).parents[2]
INFO = re.compile(r'(?P<language>[\w-]*)(?: title="(?P<title>[^"]+)")?(?P<rest>[^\n]*)\n')
REMARK = re.compile(r"<!-- (?P<key>needs|in|shortened): (?P<value>\S+) -->\s*$")
BENCH = re.compile(r"^\$ .*?mshv-irqfd bench ([^\n]*)", re.MULTILINE)
PARSERS = {"json": json.loads, "toml": tomllib.loads}
FORGIVING = doctest.ELLIPSIS
TIMEOUT = 120
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "PYTEST_ADDOPTS": "-p no:run-parallel"}
"""A terminal of 80 columns, and pytest without the plugin of this project's own suite that prints a line of its own."""


def snippets(document: Document) -> Iterable[Region]:
    """Finds the fences of a page, each with what is to be done with it."""
    for region in RawFencedCodeBlockLexer(INFO)(document):
        assert region.lexemes is not None
        remark = REMARK.search(document.text, 0, region.start)
        region.lexemes |= {"key": None, "value": None} | (remark.groupdict() if remark else {})
        region.parsed = region.lexemes["source"]
        region.evaluator = evaluate
        yield region


def evaluate(example: Example) -> str | None:
    """Runs one snippet. Returns what is wrong."""
    lexemes = example.region.lexemes
    language, title, key, value = (lexemes[name] for name in ("language", "title", "key", "value"))
    if lexemes["rest"]:
        return f"unknown options: {lexemes['rest']}"
    page = example.namespace
    if key == "needs" and value not in backends.selected():
        page["skipped"] = True
    elif key == "needs" and (reason := backends.unavailable(value)):
        if backends.required(value):
            return reason
        page["skipped"] = True
    elif language != "output":
        page["skipped"] = False
    if page["skipped"]:
        return None
    if language == "output":
        return compare(example.parsed, page.pop("printed", ""))
    if left := page.pop("printed", ""):
        return f"the snippet before it printed what the page does not show:\n{left}"
    if title:
        Path(title).parent.mkdir(parents=True, exist_ok=True)
        Path(title).write_text(example.parsed)
        return None
    if key == "in":
        return known(example.parsed, PROJECT / value)
    if language == "python":
        return run(example)
    if language == "console":
        return session(shortened(example.parsed, value) if key == "shortened" else example.parsed)
    if language in PARSERS:
        PARSERS[language](example.parsed)
        return None
    return f"a fence of the language {language!r} is not run: see tests/helpers/page.py"


def run(example: Example) -> None:
    """Runs Python, and keeps what it prints."""
    names, page = example.namespace["names"], example.namespace
    printed = io.StringIO()
    example.namespace = names
    try:
        with redirect_stdout(printed):
            PythonEvaluator()(example)
    finally:
        example.namespace = page
        page["printed"] = printed.getvalue()


def session(text: str) -> str | None:
    """Runs what a terminal shows."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:[^\n]*\\\n)*[^\n]*\n", part)
        assert command is not None
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command[0]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT,
            env={**os.environ, "PATH": path, **PLAIN},
        )
        shown = part[command.end() :]
        if problem := compare(shown, done.stdout) if shown.strip() else None:
            return f"$ {command[0]}{problem}"
        if done.returncode and not shown.strip():
            return f"$ {command[0]}fails with status {done.returncode}:\n{done.stdout}"
    return None


def shortened(text: str, backend: str) -> str:
    """The measurements that a terminal shows, each as short as can be, here."""
    joined = text.replace("\\\n", " ")
    instant = f"--backend {backend} --routes 1 --seconds 0.001 --scenarios none --json out.json"
    return "".join(f"$ mshv-irqfd bench {options} {instant} --plot out.svg\n" for options in BENCH.findall(joined))


def compare(shown: str, printed: str) -> str | None:
    """What is wrong with the output that a page shows."""
    checker, example = doctest.OutputChecker(), doctest.Example("", shown.rstrip() + "\n")
    printed = printed.rstrip() + "\n"
    if checker.check_output(example.want, printed, FORGIVING):
        return None
    return checker.output_difference(example, printed, FORGIVING)


def known(text: str, file: Path) -> str | None:
    """Which commands are not in a file of the project."""
    for command in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
        if (verb := re.fullmatch(r"make ([\w-]+)(?: [A-Z_]+=.*)?", command)) and file.name == "Makefile":
            if not re.search(rf"^{verb[1]}:.*##", file.read_text(), re.MULTILINE):
                return f"the Makefile has no {verb[1]}"
        elif command not in file.read_text():
            return f"{file.name} does not have: {command}"
    return None


def main() -> None:
    page = sys.argv[1]
    sys.path.insert(0, str(Path.cwd()))  # as a Python shell has it
    document = Document.parse(page, snippets)
    document.namespace |= {"names": {"__name__": "__main__"}, "skipped": False}
    for example in document.examples():
        example.evaluate()
    if left := document.namespace.get("printed"):
        raise SystemExit(f"{page}: the last snippet printed what the page does not show:\n{left}")


if __name__ == "__main__":
    main()
