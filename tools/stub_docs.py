"""Copies the docstrings of the built module into `_core.pyi`, so that the Rust sources are their only source.

usage: python tools/stub_docs.py [--check]    (needs ruff, which formats the stub)
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

from mshv_irqfd import _core

STUB = Path(__file__).resolve().parent.parent / "python" / "mshv_irqfd" / "_core.pyi"


Function = ast.FunctionDef | ast.AsyncFunctionDef


def document(node: ast.ClassDef | Function, thing: object) -> None:
    """Sets the docstring of a class or function of the stub to that of the module's."""
    depth = 4 * (1 if isinstance(node, ast.ClassDef) else 2)
    body = [item for item in node.body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
    text = inspect.getdoc(thing) if thing.__doc__ else None
    docstring: list[ast.stmt] = []
    if text:
        if "\n" in text:
            text = text.replace("\n", "\n" + " " * depth).replace("\n" + " " * depth + "\n", "\n\n")
            text += "\n" + " " * depth
        docstring = [ast.Expr(ast.Constant(text))]
    node.body = docstring + (body or ([] if docstring else [ast.Expr(ast.Constant(...))]))


def is_setter(node: Function) -> bool:
    """Whether a function is the setter of a property. The getter has the docstring."""
    return any(isinstance(by, ast.Attribute) and by.attr == "setter" for by in node.decorator_list)


def documented(source: str) -> str:
    """Returns the stub with the module's docstrings."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and hasattr(_core, node.name):
            runtime = getattr(_core, node.name)
            methods = [item for item in node.body if isinstance(item, Function) and not is_setter(item)]
            # Magic methods need no docstring; of overloads, the last one has it.
            for method in {method.name: method for method in methods if method.name[:2] != "__"}.values():
                document(method, getattr(runtime, method.name))
            document(node, runtime)
    text = ast.unparse(tree)
    for command in (["check", "--quiet", "--select=I", "--fix-only"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB)]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return text


def main() -> int:
    """Rewrites the stub, or with --check fails if that would change it."""
    before = STUB.read_text()
    after = documented(before)
    if "--check" in sys.argv:
        if before != after:
            sys.stderr.write(f"{STUB} does not match the module's docstrings; run: make stubs\n")
        return int(before != after)
    STUB.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
