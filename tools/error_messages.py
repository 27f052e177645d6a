"""Checks docs/errors.md against the code: every message that a user of the package can meet is there, and no other.

usage: python tools/error_messages.py [--check | --seen FILE]

Without an option it prints the messages that the page lacks. --seen FILE checks that tests have met every message:
FILE has those that the suite caught, as `pytest --messages=FILE` adds them. A row of the page whose last cell begins
with "untested" says why no test can.

A message is a string literal of four words or more in src (but not of tests, assertions or instruments), or what a
raise statement in python/mshv_irqfd says (but not in the command line and the tests' guest). An ellipsis stands for
what varies.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
OTHER_ROOMS = (
    "src/instruments/",
    "src/python/bench.rs",
    "src/python/probe.rs",
    "src/irqfd/trace.rs",
    "src/irqfd/tests",
    "src/pci/tests",
    "src/irqfd/interleavings.rs",
    "src/hypervisor/fuzzing.rs",
)
NO_MESSAGES = (
    "{:#010x}/{:#06x} (vector {:#04x}{mode}{} to {} {})",
    " of the process that forked this one",
    "of the process that forked this one",
    "vector {index} of {} stays disarmed: {}",
    "another kind of file",
    " (0-23 are the IOAPIC's pins)",
    "; {result}: GSI {}",
    "1, 2, 4, 8, 16 or 32",
)
"""What is shown or logged, but no error; and words that a longer message ends with."""
ELSEWHERE = {
    "no permission: run": ("behaviour/test_partition.py", "no permission"),
    "another process made the VM": ("behaviour/test_adopting.py", "another process made the VM"),
    "this process is a forked child": ("rules/5_only_the_owner_acts/test_fork.py", "forked child"),
    "waiting to be re-armed after": (
        "rules/3_a_failed_call_changes_nothing/test_rollback.py",
        "waiting to be re-armed",
    ),
    "… of … faults of … met no call": ("behaviour/test_testing.py", "met no call"),
    "… overlaps spare range": ("../src/irqfd/tests/loading.rs", "overlaps spare range"),
    "… does not report which": ("behaviour/test_testing.py", "does not report which"),
}
"""Messages, by their beginnings, that tests meet otherwise than by `pytest.raises`: in a child, in `faults()`, in
pytest's own output, in Rust. Each with a file of tests, and words in it."""
WORDS = 4

TOKEN = re.compile(r'//[^\n]*|r(#+)".*?"\1|"((?:[^"\\]|\\.)*)"|\'(?:[^\'\\]|\\.)\'', re.DOTALL)
TEST_ITEM = re.compile(
    r"^( *)#\[cfg\((?:test|all\(test)[^\n]*\n(?: *#\[[^\n]*\n)* *(?:pub(?:\([^)]*\))? )?"
    r"(?:fn|mod|impl)[^;{]*\{.*?^\1\}",
    re.DOTALL | re.MULTILINE,
)
ASSERTION = re.compile(r"\b(?:debug_)?assert(?:_eq|_ne)?!\(.*?\);", re.DOTALL)
PLACE = re.compile(r"\{[^{}]*\}")


def template(text: str) -> str:
    """A message with an ellipsis for what varies."""
    text = re.sub(r"\\\n\s*", "", text).replace('\\"', '"').replace("\\\\", "\\")
    return PLACE.sub("…", text).strip(" ;:,")


def of_rust(source: str) -> list[str]:
    """The messages of a Rust file."""
    source = ASSERTION.sub("", TEST_ITEM.sub("", source))
    texts = (found[2] for found in TOKEN.finditer(source) if found[2])
    return [
        template(text) for text in texts if len(text.split()) >= WORDS and text[0] != "<" and text not in NO_MESSAGES
    ]


def of_python(source: str) -> list[str]:
    """The messages of the raise statements of a Python file."""
    messages = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                if isinstance(argument, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in argument.values]
                    messages.append(template("".join(map(str, parts))))
                elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    messages.append(template(argument.value))
    return messages


def in_code() -> dict[str, str]:
    """Every message, with the file that has it."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "src").rglob("*.rs")):
        name = str(path.relative_to(ROOT))
        if not name.startswith(OTHER_ROOMS):
            found |= {message: name for message in of_rust(path.read_text()) if message not in found}
    for path in sorted((ROOT / "python" / "mshv_irqfd").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not {"_cli", "_guest"} & set(path.parts):
            found |= {message: name for message in of_python(path.read_text()) if message not in found}
    return found


def on_page() -> dict[str, str]:
    """Every message of the page, with the rest of its row."""
    rows = re.findall(r"^\| `+ ?(.+?) ?`+ \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {message.replace("\\|", "|"): rest for message, rest in rows}


def unseen(messages: dict[str, str], seen: str) -> list[str]:
    """The messages that no test has met."""
    left = []
    for message, rest in messages.items():
        otherwise = [told for begin, told in ELSEWHERE.items() if message.startswith(begin)]
        if any(words in (ROOT / "tests" / file).read_text() for file, words in otherwise):
            continue
        pattern = ".*?".join(map(re.escape, message.split("…")))
        if not rest.split("|")[-1].strip().startswith("untested") and not re.search(pattern, seen):
            left.append(message)
    return left


def main() -> int:
    """Prints what is missing, or fails because of it."""
    code, page = in_code(), on_page() if PAGE.exists() else {}
    missing, stale = (
        [message for message in code if message not in page],
        [message for message in page if message not in code],
    )
    if "--seen" in sys.argv:
        left = unseen(page, Path(sys.argv[-1]).read_text())
        sys.stderr.write("".join(f"no test meets: {message}\n" for message in left))
        return int(bool(left))
    if "--check" not in sys.argv:
        sys.stdout.write("".join(f"{code[message]}: {message}\n" for message in missing))
        return 0
    sys.stderr.write("".join(f"docs/errors.md lacks a message of {code[message]}: {message}\n" for message in missing))
    sys.stderr.write("".join(f"docs/errors.md has a message that the code has not: {message}\n" for message in stale))
    return int(bool(missing or stale))


if __name__ == "__main__":
    sys.exit(main())
