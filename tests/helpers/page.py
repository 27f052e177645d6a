"""Runs every snippet of a page of the docs, in the current directory, as its reader would: python page.py PAGE.

| fence | is |
|---|---|
| `python` | run, in one namespace for the whole page |
| `python title="NAME"`, and any other language with a title | written to the file NAME |
| `console` | run by a shell: what follows a `$ `, and the output shown below it is compared |
| `output`, or none | compared with what the `python` block before it printed; `...` stands for anything |
| `json`, `toml` without a title | parsed |
| `sh` | commands of the Makefile, which are only looked up there |

A comment before a fence says what else it needs: `<!-- needs: kvm -->` runs it where that backend is, and
`<!-- needs: qemu-storage-daemon -->` where that program is. The examples can be imported. A command that
sets a machine up is not run again: `<!-- in: Makefile -->` demands that each command of the fence is in that file of
the project, or, for `make VERB`, that the verb exists. A measurement of minutes is run for an instant, on another
backend: `<!-- shortened: simulated -->`. A page that goes on where another one ends begins with that one's files:
`<!-- after: device-model.md -->`.
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
from mshv_irqfd import testing
from needs import PROGRAMS, lacks_program
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROJECT = Path(__file__).parents[2]
INFO = re.compile(r'(?P<language>[\w-]*)(?: title="(?P<title>[^"]+)")?(?P<rest>[^\n]*)\n')
REMARK = re.compile(r"<!-- (?P<key>needs|in|shortened): (?P<value>\S+) -->\s*$")
AFTER = re.compile(r"<!-- after: (\S+) -->")
BENCH = re.compile(r"^\$ .*?mshv-irqfd bench ([^\n]*)", re.MULTILINE)
OUTPUT = {"output", ""}
FORGIVING = doctest.ELLIPSIS
WRAPPED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE  # programs fold their help to the terminal
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
    lexemes, page = example.region.lexemes, example.namespace
    shows_output = lexemes["language"] in OUTPUT
    if not shows_output:
        page["skipped"] = lexemes["key"] == "needs" and lacks(lexemes["value"])
    if page["skipped"]:
        return None
    printed = page.pop("printed", "")
    if shows_output:
        return compare(example.parsed, printed)
    if printed:
        return f"the snippet before it printed what the page does not show:\n{printed}"
    return KINDS.get(kind(lexemes), unknown)(example)


def kind(lexemes: dict[str, str]) -> str:
    """What sort of snippet it is: a key of KINDS."""
    if lexemes["rest"]:
        return "unknown"
    if lexemes["title"]:
        return "file"
    return lexemes["key"] if lexemes["key"] in {"in", "shortened"} else lexemes["language"]


def unknown(example: Example) -> str:
    """Refuses a snippet that would not be run."""
    lexemes = example.region.lexemes
    return f"a fence of {lexemes['language']!r}{lexemes['rest']} is not run: see tests/helpers/page.py"


def lacks(backend: str) -> bool:
    """Whether a backend or program is missing here. Raises if it was asked for by name."""
    if backend in PROGRAMS:
        return lacks_program(backend) is not None
    reason, required = backends.unavailable(backend), testing.required_backends()
    assert reason is None or backend not in required, reason
    return reason is not None or bool(required and backend not in required)


def write(example: Example) -> str | None:
    """Writes a file."""
    file = Path(example.region.lexemes["title"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(example.parsed)
    return None


def run(example: Example) -> str | None:
    """Runs Python, and keeps what it prints."""
    page, printed = example.namespace, io.StringIO()
    example.namespace = page["names"]
    try:
        with redirect_stdout(printed):
            PythonEvaluator()(example)
    finally:
        example.namespace = page
        page["printed"] = printed.getvalue()
    return None


def parsed(parse: Callable[[str], object]) -> Callable[[Example], str | None]:
    """A treatment that only parses."""

    def treat(example: Example) -> str | None:
        parse(example.parsed)
        return None

    return treat


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
        if problem := compare(shown, done.stdout, WRAPPED) if shown.strip() else None:
            return f"$ {command[0]}{problem}"
        if done.returncode and not shown.strip():
            return f"$ {command[0]}fails with status {done.returncode}:\n{done.stdout}"
    return None


def shortened(text: str, backend: str) -> str:
    """The measurements that a terminal shows, each as short as can be, here."""
    joined = text.replace("\\\n", " ")
    instant = f"--backend {backend} --routes 1 --seconds 0.001 --scenarios none --json out.json"
    return "".join(f"$ mshv-irqfd bench {options} {instant} --plot out.svg\n" for options in BENCH.findall(joined))


def compare(shown: str, printed: str, flags: int = FORGIVING) -> str | None:
    """What is wrong with the output that a page shows."""
    checker, example = doctest.OutputChecker(), doctest.Example("", shown.rstrip() + "\n")
    printed = printed.rstrip() + "\n"
    if checker.check_output(example.want, printed, flags):
        return None
    return checker.output_difference(example, printed, flags)


def known(text: str, file: Path) -> str | None:
    """Which commands are not in a file of the project."""
    for command in re.findall(r"^\$ (.+?)(?: +#.*)?$", text, re.MULTILINE):
        if (verb := re.fullmatch(r"make ([\w-]+)(?: [A-Z_]+=.*)?", command)) and file.name == "Makefile":
            if not re.search(rf"^{verb[1]}:.*##", file.read_text(), re.MULTILINE):
                return f"the Makefile has no {verb[1]}"
        elif command not in file.read_text():
            return f"{file.name} does not have: {command}"
    return None


KINDS: dict[str, Callable[[Example], str | None]] = {
    "file": write,
    "python": run,
    "console": lambda example: session(example.parsed),
    "json": parsed(json.loads),
    "toml": parsed(tomllib.loads),
    "sh": lambda example: known(re.sub("^", "$ ", example.parsed, flags=re.MULTILINE), PROJECT / "Makefile"),
    "in": lambda example: known(example.parsed, PROJECT / example.region.lexemes["value"]),
    "shortened": lambda example: session(shortened(example.parsed, example.region.lexemes["value"])),
}
"""What is done with each kind of snippet."""


def main() -> None:
    page = sys.argv[1]
    sys.path.insert(0, str(Path.cwd()))  # as a Python shell has it
    sys.path.append(str(PROJECT / "examples"))
    document = Document.parse(page, snippets)
    for before in AFTER.findall(document.text):
        for example in Document.parse(str(Path(page).parent / before), snippets).examples():
            if kind(example.region.lexemes) == "file":
                write(example)
    document.namespace |= {"names": {"__name__": "__main__"}, "skipped": False}
    for example in document.examples():
        example.evaluate()
    if left := document.namespace.get("printed"):
        raise SystemExit(f"{page}: the last snippet printed what the page does not show:\n{left}")


if __name__ == "__main__":
    main()
