"""Breaks the package's rules on purpose, one clause at a time, and checks that the named tests fail.

usage: python tools/break_rules.py [--lab] [NAME...]    (needs git, cargo, and `make build-dev`)
       python tools/break_rules.py --check              (do all of them apply, and do the tests that they name exist?)

Each patch in tests is one break: a first line that states the clause, `Red:` lines that name the tests that must
fail, and a patch. The patch is applied to a copy of the tree and reverted afterwards. The copy and its builds are kept
in ~/.cache/mshv_irqfd/broken (or under $XDG_CACHE_HOME). The first word of a `Red:` line is the test's runner:

    Red: rust MODULE::TEST          of the Rust tests
    Red: shuttle MODULE::TEST       of the interleaving tests
    Red: pytest FILE::TEST[...]     of the Python tests
    Red: lab FILE::TEST[...]        of the Python tests, on the real mshv driver in the lab: run with --lab only

` | ` and words that the failure's message must contain may follow. Every test must pass without a patch. It is an error
if a patch does not apply or build, or if a test passes, is skipped, hangs or does not exist; errors are repeated at the
end.
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
BREAKS = ROOT / "tests"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mshv_irqfd" / "broken"
TREE, TARGET = CACHE / "tree", CACHE / "target"
MODULE = TREE / "python" / "mshv_irqfd" / "_core.abi3.so"
LONGEST = 180
"""The time limit for the tests of one break, in seconds: far more than they need."""
LONGEST_IN_LAB = 600
"""The same in the lab, whose Linux guest waits for a minute before it gives up."""
WIDTH = 160
SCHEDULER = "core"

# The message of a panic follows the line with its location, and precedes the test harness's notes.
PANIC = re.compile(r"panicked at [^\n]*:\n(.*?)(?=^note: |\nthread |\Z)", re.MULTILINE | re.DOTALL)
KINDS = ("rust", "shuttle", "pytest", "lab")


@dataclass(frozen=True)
class Test:
    """A test that must fail, and words that its message must contain."""

    kind: str
    name: str
    words: str = ""


@dataclass(frozen=True)
class Break:
    """A clause of a rule, a patch that breaks it, and the tests that must fail."""

    name: str
    clause: str
    tests: tuple[Test, ...]
    patch: Path


@dataclass(frozen=True)
class Outcome:
    """The result of a test: "passed", "failed" or the reason for neither, and its message."""

    state: str
    message: str = ""


class WrongError(Exception):
    """A break cannot be tried."""


def read(patch: Path, kinds: tuple[str, ...]) -> Break:
    """Reads a break, with its tests of the given kinds."""
    clause, *head = patch.read_text().split("\n\n", 1)[0].splitlines()
    tests = []
    for line in head:
        found = re.fullmatch(r"Red: (\w+) (.*?)(?: \| (.*))?", line)
        if found is None or found[1] not in KINDS:
            raise WrongError(f"{patch.name}: {line!r} is not of the form `Red: {'|'.join(KINDS)} TEST [| WORDS]`")
        tests.append(Test(found[1], found[2], found[3] or ""))
    if not tests:
        raise WrongError(f"{patch.name} names no test")
    return Break(patch.stem, clause, tuple(test for test in tests if test.kind in kinds), patch)


def run(*command: str | Path, longest: float = LONGEST, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy, and captures standard output and error together."""
    return subprocess.run(  # noqa: S603 -- our own commands
        list(map(str, command)),
        cwd=TREE,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=longest if command[0] != "cargo" else None,
        check=False,
    )


def copy() -> None:
    """Makes the copy equal to the tree. Equal files keep their times, so that nothing is built twice."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(listing, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
    names = {name for name in output.split("\0") if name and (ROOT / name).is_file()}
    for old in [path for path in TREE.rglob("*") if path.is_file() and path != MODULE]:
        if str(old.relative_to(TREE)) not in names:
            old.unlink()
    for name in sorted(names):
        put_back(name)


def put_back(name: str) -> None:
    """Makes a file of the copy equal to the tree's, with a new time if it differed."""
    source, copied = ROOT / name, TREE / name
    if not copied.is_file() or copied.read_bytes() != source.read_bytes():
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copied)


def apply(patch: Path) -> list[str]:
    """Applies a patch to the copy, and returns the names of the files that it changed."""
    # The cache may lie inside another repository, which git must not use.
    apart = {"GIT_CEILING_DIRECTORIES": str(TREE.parent)}
    # One line of context on either side is enough to find the place.
    done = run("git", "apply", "-C1", "--recount", patch, **apart)
    if done.returncode != 0:
        raise WrongError(f"does not apply: {done.stdout.strip()}; update it to the current code")
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)


def cargo(target: str, *command: str, **environment: str) -> Path:
    """Builds the library's tests or the module, and returns the path of the result."""
    # Each break is built once and run for a moment: optimization would take longer than it saves.
    environment |= {"CARGO_TARGET_DIR": str(TARGET / target), "CARGO_PROFILE_DEV_OPT_LEVEL": "0"}
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
    """A message on one line, cut to a limit."""
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
    # The results of all tests precede their output.
    results = dict(re.findall(r"^test (\S+) \.\.\. (\w+)$", output, re.MULTILINE))
    parts = re.split(r"^---- (\S+) stdout ----$|^failures:$", output, flags=re.MULTILINE)
    outputs = dict(zip(parts[1::2], parts[2::2], strict=True))
    outcomes = {}
    for test in tests:
        state = {"ok": "passed", "FAILED": "failed"}.get(results.get(test.name, ""), "missing or unfinished")
        panics = PANIC.findall(outputs.get(test.name, ""))
        outcomes[test] = Outcome(state, panics[0].strip() if panics else "")
    return outcomes


def python(tests: list[Test], *before: str | Path) -> dict[Test, Outcome]:
    """Builds the module and runs Python tests, optionally with a command in front of the interpreter's."""
    built = cargo("python", "build", "--features", "python")
    # A new file, because a running process may have the old one mapped.
    MODULE.unlink(missing_ok=True)
    shutil.copy(built, MODULE)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        report = Path(directory) / "report.xml"
        if before:
            before = (*before, "--report-dir", directory, "--")
        options = ["-p", "no:cacheprovider", "--timeout=30", "--timeout-method=signal", f"--junitxml={report}"]
        environment = {"PYTHONPATH": str(TREE / "python"), "PYTHONDONTWRITEBYTECODE": "1", "MSHV_IRQFD_PATIENCE": "10"}
        names = [test.name for test in tests]
        longest = LONGEST
        if before:
            longest, environment["LAB_INITRAMFS"] = LONGEST_IN_LAB, initramfs()
        try:
            command = (*before, sys.executable, "-m", "pytest", *options, *names)
            done = run(*command, longest=longest, **environment)
        except subprocess.TimeoutExpired:
            return {test: Outcome("unfinished") for test in tests}
        if not report.exists():
            return {test: Outcome("not run", done.stdout.strip()[-500:]) for test in tests}
        cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 -- written by pytest
    return {test: of_case(test, cases) for test in tests}


def initramfs() -> str:
    """The path of the initramfs of the lab's Linux guest, which is built if need be."""
    done = run(ROOT / "lab" / "initramfs")
    if done.returncode != 0:
        raise WrongError(f"lab/initramfs: {done.stdout.strip()[-500:]}")
    return done.stdout.splitlines()[-1]


def of_case(test: Test, cases: list[ET.Element]) -> Outcome:
    """The outcome of a Python test, from pytest's report."""
    file, name = test.name.split("::", 1)
    module = file.removesuffix(".py").replace("/", ".")
    mine = [case for case in cases if case.get("classname") == module and case.get("name") == name]
    if not mine:
        return Outcome("missing")
    for case in mine:
        for end in case:
            if end.tag in {"failure", "error", "skipped"}:
                state = {"failure": "failed", "error": "stopped by an error"}.get(end.tag, end.tag)
                # If a test helper asserts, only the failing lines describe the failure.
                lines = re.findall(r"^[>E] +(.*)", end.text or "", re.MULTILINE)
                return Outcome(state, " ".join(lines) or end.get("message") or "")
    return Outcome("passed")


def ran(tests: tuple[Test, ...]) -> dict[Test, Outcome]:
    """Runs tests of all kinds on the current copy."""
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
            lab = ["--scheduler", SCHEDULER, "--timeout", str(LONGEST_IN_LAB - 20)]
            names = ["MSHV_IRQFD_PATIENCE", "PYTHONDONTWRITEBYTECODE", "LAB_INITRAMFS"]
            outcomes |= python(mine, ROOT / "lab" / "run", *lab, *(f"--env={name}" for name in names))
    return outcomes


def tell(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def unbroken(breaks: list[Break]) -> list[str]:
    """Runs all named tests without a patch, and returns an error for each that does not pass."""
    outcomes = ran(tuple(test for each in breaks for test in each.tests))
    return [
        f"{test.name} ({test.kind}) {outcome.state} without a patch: {shortened(outcome.message)}"
        for test, outcome in outcomes.items()
        if outcome.state != "passed"
    ]


def tried(each: Break) -> list[str]:
    """Applies a break, runs its tests, and returns the errors."""
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
            state = f"failed without the words {test.words!r}" if outcome.state == "failed" else outcome.state
            wrong.append(f"{each.name}: {test.name} ({test.kind}): {state}")
    return wrong


def check(breaks: list[Break]) -> list[str]:
    """Returns an error for each patch that does not apply, and for each named test that does not exist."""
    collect = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "--quiet", BREAKS]
    collected = subprocess.run(collect, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
    there = set(collected.splitlines())
    functions = set(re.findall(r"\bfn (\w+)", "".join(path.read_text() for path in (ROOT / "src").rglob("*.rs"))))
    wrong = []
    for each in breaks:
        apply_it = ["git", "apply", "--check", "-C1", "--recount", each.patch]
        done = subprocess.run(apply_it, cwd=ROOT, check=False, stderr=subprocess.PIPE, text=True)  # noqa: S603
        if done.returncode != 0:
            wrong.append(f"{each.name} does not apply: {done.stderr.strip()}")
        for test in each.tests:
            name = test.name.rpartition("::")[2]
            if test.name not in there if test.kind in ("pytest", "lab") else name not in functions:
                wrong.append(f"{each.name} names a test that does not exist: {test.name} ({test.kind})")
    return wrong


def main() -> int:
    """Tries the breaks, and prints the results."""
    arguments = argparse.ArgumentParser(description="Breaks the rules on purpose and checks that tests fail.")
    arguments.add_argument("names", metavar="NAME", nargs="*", help="a patch in tests/rules, by name (default: all)")
    arguments.add_argument("--lab", action="store_true", help="run the tests of the lab, and no others")
    arguments.add_argument("--check", action="store_true", help="try none, but check that all still fit the code")
    options = arguments.parse_args()
    patches = {patch.stem: patch for patch in sorted(BREAKS.rglob("*.patch"))}
    if unknown := set(options.names) - set(patches):
        arguments.error(f"unknown break: {', '.join(sorted(unknown))}")
    if options.check:
        wrong = check([read(patch, KINDS) for patch in patches.values()])
        sys.stderr.writelines(f"{line}\n" for line in wrong)
        return int(bool(wrong))
    began = time.monotonic()
    kinds = ("lab",) if options.lab else tuple(kind for kind in KINDS if kind != "lab")
    try:
        breaks = [read(patches[name], kinds) for name in options.names or patches]
        breaks = [each for each in breaks if each.tests]
        TREE.mkdir(parents=True, exist_ok=True)
        copy()
        wrong = unbroken(breaks)
    except WrongError as error:
        wrong = [f"without a patch: {error}"]
    if not wrong:
        for each in breaks:
            wrong += tried(each)
        number = sum(len(each.tests) for each in breaks)
        tell(f"\n{len(breaks)} breaks, {number} tests that must fail, {time.monotonic() - began:.0f} s")
    tell("\n".join(["", *(f"ERROR {line}" for line in wrong)]) if wrong else "every named test failed under its break")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
