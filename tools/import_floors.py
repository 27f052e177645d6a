"""Checks that the Rust files import in one direction only, and prints the floors that follow.

usage: python tools/import_floors.py [--check]

A file's floor is one above the highest file that it imports. A circle has no floor, and is an error; so is an import
from one room of the house to another that stands above it. Tests are left out: they may look everywhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
TESTS = {
    "irqfd/tests",
    "irqfd/tests/walk",
    "irqfd/interleavings",
    "pci/tests",
    "pci/interleavings",
    "hypervisor/fuzzing",
}
ROOMS = {
    "python": {"pci", "irqfd", "instruments", "hypervisor"},
    "pci": {"irqfd", "hypervisor"},
    "irqfd": {"hypervisor"},
    "instruments": {"hypervisor"},
    "hypervisor": set[str](),
}
"""The rooms that each room may import from, besides itself."""
USE = re.compile(r"^\s*(?:pub(?:\([^)]*\))? )?use ([^;]+);", re.MULTILINE)
PATH = re.compile(r"\b(?:crate|super)(?:::\w+)+")
TEST_MODULE = re.compile(r"^#\[cfg\(test\)\]\n(?:#\[.*\]\n)*mod \w+ \{.*?^\}$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"//[^\n]*")


def modules() -> dict[str, Path]:
    """Every file, by the path of its module from the crate's root."""
    found = {}
    for path in sorted(SOURCES.rglob("*.rs")):
        name = str(path.relative_to(SOURCES).with_suffix("")).removesuffix("/mod")
        if name not in TESTS | {"lib"}:
            found[name] = path
    return found


def split(tree: str) -> list[str]:
    """The paths of a use tree, without its braces."""
    tree = re.sub(r"\s+", " ", tree).strip()
    if "{" not in tree:
        return [tree.split(" as ")[0]]
    head, body = tree.split("{", 1)
    paths, depth, part = [], 0, ""
    for letter in body[: body.rindex("}")] + ",":
        if letter == "," and depth == 0:
            paths += [head + path for path in split(part)] if part.strip() else []
            part = ""
            continue
        depth += {"{": 1, "}": -1}.get(letter, 0)
        part += letter
    return paths


def resolve(path: str, module: str, known: dict[str, Path]) -> str | None:
    """The file that a path leads to; None for another crate's."""
    parts = path.replace(" ", "").split("::")
    here = module.split("/")
    if parts[0] == "crate":
        at, parts = [], parts[1:]
    elif parts[0] in {"super", "self"}:
        at = here
        while parts and parts[0] in {"super", "self"}:
            at, parts = (at[:-1] if parts[0] == "super" else at), parts[1:]
    else:
        at = here  # a child of this module, or another crate
    best = "/".join(at)
    for part in parts:
        at = [*at, part]
        if "/".join(at) not in known:
            break
        best = "/".join(at)
    return best if best in known and best != module else None


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The files that a file imports from."""
    text = TEST_MODULE.sub("", COMMENT.sub("", path.read_text()))
    paths = [each for tree in USE.findall(text) for each in split(tree)]
    paths += PATH.findall(USE.sub("", text))
    return {found for each in paths if (found := resolve(each, module, known)) is not None}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """How high each file stands."""
    heights: dict[str, int] = {}
    for module in TopologicalSorter(graph).static_order():
        heights[module] = 1 + max((heights[below] for below in graph[module]), default=0)
    return heights


def wrong_rooms(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room that may not be imported from."""
    wrong = []
    for module, below in graph.items():
        room = module.split("/")[0]
        for other in sorted(below):
            there = other.split("/")[0]
            if there not in ROOMS[room] | {room}:
                wrong += [f"{module} imports {other}: nothing in {room}/ may know of {there}/"]
    return wrong


def main() -> int:
    """Prints the floors, or with --check only errors."""
    arguments = argparse.ArgumentParser(description="Check that the Rust files import in one direction only.")
    arguments.add_argument("--check", action="store_true", help="print errors only")
    options = arguments.parse_args()
    known = modules()
    graph = {module: imports(module, path, known) for module, path in known.items()}
    try:
        heights = floors(graph)
    except CycleError as circle:
        sys.stderr.write(f"the imports go round in a circle: {' -> '.join(circle.args[1])}\n")
        return 1
    wrong = wrong_rooms(graph)
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    if not options.check:
        for floor in sorted(set(heights.values()), reverse=True):
            names = sorted(name for name, height in heights.items() if height == floor)
            sys.stdout.write(f"{floor:2}  {'  '.join(names)}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
