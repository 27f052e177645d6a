"""Breaks the rules of the package on purpose, one clause at a time, and demands that named tests fail.

usage: python tools/break_rules.py [--lab] [NAME...]    (needs git, cargo, and what `make build-dev` sets up)

Each patch in tests/rules is such a break: a first line that says which clause, `Red:` lines that name the tests which
must fail, and a patch. It is applied to a copy of the tree, which is kept with what was built of it (in
~/.cache/mshv_irqfd/broken, or under $XDG_CACHE_HOME), and taken back after. A test is named by what runs it:

    Red: rust MODULE::TEST          of the Rust tests
    Red: shuttle MODULE::TEST       of those that try interleavings
    Red: pytest FILE::TEST[...]     of the Python tests
    Red: lab FILE::TEST[...]        the same on the real mshv driver, in the lab: only tried with --lab

and may be followed by ` | ` and words that its message must have. All must pass while nothing is broken. A patch that
does not apply or build, a test that passes, is skipped, hangs or is not there: each is an error, told again at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
BREAKS = ROOT / "tests" / "rules"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mshv_irqfd" / "broken"
TREE, TARGET = CACHE / "tree", CACHE / "target"
MODULE = TREE / "python" / "mshv_irqfd" / "_core.abi3.so"
LONGEST = 180
"""Seconds that the tests of one break may take, far more than they do."""
WIDTH = 160
SCHEDULER = "core"

# The message of a panic is behind the line that says where, and before what the test harness adds.
PANIC = re.compile(r"panicked at [^\n]*:\n(.*?)(?=^note: |\nthread |\Z)", re.MULTILINE | re.DOTALL)
KINDS = ("rust", "shuttle", "pytest", "lab")


@dataclass(frozen=True)
class Test:
    """A test that must fail, and words that must be in what it says then."""

    kind: str
    name: str
    words: str = ""


@dataclass(frozen=True)
class Break:
    """A clause of a rule, a patch that breaks it, and the tests that must notice."""

    name: str
    clause: str
    tests: tuple[Test, ...]
    patch: Path


@dataclass(frozen=True)
class Outcome:
    """How a test ended: "passed", "failed" or why neither; and what it said."""

    state: str
    message: str = ""


class WrongError(Exception):
    """Something that keeps a break from being tried."""


def read(patch: Path, kinds: tuple[str, ...]) -> Break:
    """Reads a break, with its tests of some kinds."""
    clause, *head = patch.read_text().split("\n\n", 1)[0].splitlines()
    tests = []
    for line in head:
        found = re.fullmatch(r"Red: (\w+) (.*?)(?: \| (.*))?", line)
        if found is None or found[1] not in KINDS:
            raise WrongError(f"{patch.name}: {line!r} is no line of the form `Red: {'|'.join(KINDS)} TEST [| WORDS]`")
        tests.append(Test(found[1], found[2], found[3] or ""))
    if not tests:
        raise WrongError(f"{patch.name} names no test")
    return Break(patch.stem, clause, tuple(test for test in tests if test.kind in kinds), patch)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy, with both outputs kept in one."""
    return subprocess.run(  # noqa: S603 -- our own commands
        list(map(str, command)),
        cwd=TREE,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST if command[0] != "cargo" else None,
        check=False,
    )


def copy() -> None:
    """Makes the copy equal to the tree. What is equal already is not touched, so that nothing is built twice."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(listing, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
    names = {name for name in output.split("\0") if name and (ROOT / name).is_file()}
    for old in [path for path in TREE.rglob("*") if path.is_file() and path != MODULE]:
        if str(old.relative_to(TREE)) not in names:
            old.unlink()
    for name in sorted(names):
        put_back(name)


def put_back(name: str) -> None:
    """Makes a file of the copy what it is in the tree, with a new time if it was another."""
    source, copied = ROOT / name, TREE / name
    if not copied.is_file() or copied.read_bytes() != source.read_bytes():
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copied)


def apply(patch: Path) -> list[str]:
    """Applies a patch to the copy and says which files it changed."""
    # Not to be taken for part of a repository that the cache is in.
    apart = {"GIT_CEILING_DIRECTORIES": str(TREE.parent)}
    # As much context as is there is used to find the place; a line on either side is enough.
    done = run("git", "apply", "-C1", "--recount", patch, **apart)
    if done.returncode != 0:
        raise WrongError(f"does not apply any more: {done.stdout.strip()}; write it anew for the code as it is")
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)


def cargo(target: str, *command: str, **environment: str) -> Path:
    """Builds the library's tests or the module, and says which file that is."""
    environment |= {"CARGO_TARGET_DIR": str(TARGET / target)}
    done = run("cargo", *command, "--quiet", "--locked", "--lib", "--message-format=json", **environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    messages = [message for message in map(json.loads, lines) if message.get("target", {}).get("name") == "mshv_irqfd"]
    if done.returncode != 0:
        errors = [
            text["message"] for message in messages if (text := message.get("message")) and text["level"] == "error"
        ]
        raise WrongError(f"does not build: {errors[0] if errors else done.stdout.strip()[-500:]}")
    built = [message for message in messages if message["reason"] == "compiler-artifact"][-1]
    return Path(built["executable"] or next(name for name in built["filenames"] if name.endswith(".so")))


def shortened(text: str) -> str:
    """What was said, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def rust(tests: list[Test], target: str, **environment: str) -> dict[Test, Outcome]:
    """Builds and runs Rust tests."""
    binary = cargo(target, "test", "--no-run", **environment)
    command = [binary, "--exact", "--test-threads=2", *(test.name for test in tests)]
    try:
        output = run(*command, RUST_BACKTRACE="0").stdout
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode()
    # After the lines that say how each ended comes what each wrote.
    ends = dict(re.findall(r"^test (\S+) \.\.\. (\w+)$", output, re.MULTILINE))
    parts = re.split(r"^---- (\S+) stdout ----$|^failures:$", output, flags=re.MULTILINE)
    wrote = dict(zip(parts[1::2], parts[2::2], strict=True))
    outcomes = {}
    for test in tests:
        state = {"ok": "passed", "FAILED": "failed"}.get(ends.get(test.name, ""), "not there, or it did not end")
        panics = PANIC.findall(wrote.get(test.name, ""))
        outcomes[test] = Outcome(state, panics[0].strip() if panics else "")
    return outcomes


def python(tests: list[Test], *before: str | Path) -> dict[Test, Outcome]:
    """Builds the module and runs Python tests, by a command before the interpreter if need be."""
    built = cargo("python", "build", "--features", "python")
    # A new file in place of the old, which something may have open.
    MODULE.unlink(missing_ok=True)
    shutil.copy(built, MODULE)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        report = Path(directory) / "report.xml"
        if before:
            before = (*before, "--report-dir", directory, "--")
        options = ["-p", "no:cacheprovider", "--timeout=30", "--timeout-method=signal", f"--junitxml={report}"]
        environment = {"PYTHONPATH": str(TREE / "python"), "PYTHONDONTWRITEBYTECODE": "1", "MSHV_IRQFD_PATIENCE": "10"}
        names = [test.name for test in tests]
        try:
            done = run(*before, sys.executable, "-m", "pytest", *options, *names, **environment)
        except subprocess.TimeoutExpired:
            return {test: Outcome("it did not end") for test in tests}
        if not report.exists():
            return {test: Outcome("not run", done.stdout.strip()[-500:]) for test in tests}
        cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 -- pytest's own
    return {test: of_case(test, cases) for test in tests}


def of_case(test: Test, cases: list[ET.Element]) -> Outcome:
    """How a Python test ended, by pytest's report."""
    file, name = test.name.split("::", 1)
    module = file.removesuffix(".py").replace("/", ".")
    mine = [case for case in cases if case.get("classname") == module and case.get("name") == name]
    if not mine:
        return Outcome("not there")
    for case in mine:
        for end in case:
            if end.tag in {"failure", "error", "skipped"}:
                state = {"failure": "failed", "error": "not run to its end"}.get(end.tag, end.tag)
                # Where a helper of the tests asserts, only the line that did so tells anything.
                lines = re.findall(r"^[>E] +(.*)", end.text or "", re.MULTILINE)
                return Outcome(state, " ".join(lines) or end.get("message") or "")
    return Outcome("passed")


def ran(tests: tuple[Test, ...]) -> dict[Test, Outcome]:
    """Runs tests of any kind on the copy as it is."""
    outcomes: dict[Test, Outcome] = {}
    for kind in KINDS:
        mine = [test for test in dict.fromkeys(tests) if test.kind == kind]
        if not mine:
            continue
        if kind == "rust":
            outcomes |= rust(mine, "rust")
        elif kind == "shuttle":
            outcomes |= rust(mine, "shuttle", RUSTFLAGS="--cfg shuttle")
        elif kind == "pytest":
            outcomes |= python(mine)
        else:
            lab = ["--scheduler", SCHEDULER, "--timeout", "600", "--env", "MSHV_IRQFD_PATIENCE"]
            outcomes |= python(mine, ROOT / "lab" / "run", *lab, "--env", "PYTHONDONTWRITEBYTECODE")
    return outcomes


def tell(line: str) -> None:
    """Says something at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def unbroken(breaks: list[Break]) -> list[str]:
    """Runs all named tests with nothing broken, and says which did not pass."""
    outcomes = ran(tuple(test for each in breaks for test in each.tests))
    return [
        f"{test.name} ({test.kind}) {outcome.state} with nothing broken: {shortened(outcome.message)}"
        for test, outcome in outcomes.items()
        if outcome.state != "passed"
    ]


def tried(each: Break) -> list[str]:
    """Applies a break, runs its tests, and says what is wrong with how that went."""
    tell(f"\n{each.name}\n    {each.clause}")
    touched: list[str] = []
    try:
        touched = apply(each.patch)
        outcomes = ran(each.tests)
    except WrongError as error:
        tell(f"    ERROR {error}")
        return [f"{each.name} {error}"]
    finally:
        for name in touched:
            put_back(name)
    wrong = []
    for test, outcome in outcomes.items():
        red = outcome.state == "failed" and test.words in outcome.message
        tell(f"    {'red' if red else 'ERROR'} {test.kind} {test.name}\n        {shortened(outcome.message)}")
        if not red:
            state = f"failed without saying {test.words!r}" if outcome.state == "failed" else outcome.state
            wrong.append(f"{each.name}: {test.name} ({test.kind}): {state}")
    return wrong


def main() -> int:
    """Tries the breaks, and tells how that went."""
    arguments = argparse.ArgumentParser(description="Breaks the rules on purpose and demands that tests fail.")
    arguments.add_argument(
        "names", metavar="NAME", nargs="*", help="a patch in tests/rules, by its file name; by default all"
    )
    arguments.add_argument("--lab", action="store_true", help="try the tests of the lab, and no others")
    options = arguments.parse_args()
    patches = {patch.stem: patch for patch in sorted(BREAKS.rglob("*.patch"))}
    if unknown := set(options.names) - set(patches):
        arguments.error(f"there is no break {', '.join(sorted(unknown))}")
    began = time.monotonic()
    kinds = ("lab",) if options.lab else tuple(kind for kind in KINDS if kind != "lab")
    try:
        breaks = [read(patches[name], kinds) for name in options.names or patches]
        breaks = [each for each in breaks if each.tests]
        TREE.mkdir(parents=True, exist_ok=True)
        copy()
        wrong = unbroken(breaks)
    except WrongError as error:
        wrong = [f"with nothing broken: {error}"]
    if not wrong:
        for each in breaks:
            wrong += tried(each)
        number = sum(len(each.tests) for each in breaks)
        tell(f"\n{len(breaks)} breaks, {number} tests that must fail, {time.monotonic() - began:.0f} s")
    tell("\n".join(["", *(f"ERROR {line}" for line in wrong)]) if wrong else "each was noticed by every test named")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
