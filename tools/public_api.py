"""A griffe extension: shows the public classes as their users see them, where the site's reference is built.

A public class of `handles.py` is a subclass of one in `_core`, whose stub has the docstrings and types. This moves the
members, the docstring and the constructor from there, drops private bases, and gives methods that are overloads alone
the documentation of their last one.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import griffe

CORE = "_core"
ALIAS = "Public"
"""The prefix of the stub's import aliases for public classes."""


class PublicApi(griffe.Extension):
    """Run by griffe for the package `mshv_irqfd`."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrites the classes of the package."""
        if pkg.name != "mshv_irqfd":
            return
        core = pkg[CORE]
        for cls in own_classes(core):
            add_overloads(cls)
        for cls in (*own_classes(core), *own_classes(pkg["handles"])):
            take_over(cls, bases(cls, core))
        for module in (core, pkg["handles"], pkg["values"], pkg["errors"]):
            for cls in own_classes(module):
                cls.bases = public_bases(cls, module)
                for shown in (cls, *cls.members.values()):
                    name_public_classes(shown, pkg)
                    mark_examples(shown)
        mark_examples(pkg["handles.open_partition"])


def own_classes(module: griffe.Module) -> list[griffe.Class]:
    """The classes that a module defines, without those that it imports."""
    return [cls for cls in module.classes.values() if not cls.is_alias]


def public_bases(cls: griffe.Class, module: griffe.Module) -> list[str | griffe.Expr]:
    """The bases of a class that users know, those of its private bases in their place."""
    found: list[str | griffe.Expr] = []
    for base in cls.bases:
        name = str(base)
        if name.startswith("_") and name in module.classes:
            found += public_bases(module[name], module)
        elif not name.startswith(("_", "Vector", "Device")):
            found.append(base)
    return found


def bases(cls: griffe.Class, core: griffe.Module) -> list[griffe.Class]:
    """The classes of `_core` that a class derives from, the nearest first."""
    found: list[griffe.Class] = []
    for base in cls.bases:
        name = str(base).removeprefix(f"{CORE}.")
        if (cls.module is core or str(base).startswith(f"{CORE}.")) and name in core.classes:
            parent = core[name]
            found += [parent, *bases(parent, core)]
    return found


def add_overloads(cls: griffe.Class) -> None:
    """Gives methods that the stub has as overloads alone a member with the last one's documentation."""
    for name, overloads in cls.overloads.items():
        if name not in cls.members and overloads:
            shown = copy(overloads[-1])
            shown.overloads = list(overloads[:-1])  # the last is the member itself
            cls.set_member(name, shown)
    # The members of an alias, as every public class is, keep their order instead of being sorted by line.
    cls.members = dict(sorted(cls.members.items(), key=lambda member: member[1].lineno or 0))


def take_over(cls: griffe.Class, parents: list[griffe.Class]) -> None:
    """Copies what a class has from `_core` into it."""
    constructor = None
    for parent in (cls, *parents):
        if cls.docstring is None and parent.docstring is not None:
            cls.docstring = copy(parent.docstring)
            cls.docstring.parent = cls
        constructor = constructor or parent.members.get("__new__")
        for name, member in parent.members.items():
            if name not in cls.members and not name.startswith("_"):
                cls.set_member(name, copy(member))
    if constructor is not None and cls.docstring is not None and "\nArgs:\n" in cls.docstring.value:
        made = copy(constructor)
        made.name = "__init__"
        made.parameters = griffe.Parameters(*list(constructor.parameters)[1:])
        cls.set_member("__init__", made)


def name_public_classes(member: griffe.Object | griffe.Alias, pkg: griffe.Module) -> None:
    """Lets the types of a member lead to the public classes: the stub has them by import aliases, or as their bases."""
    public = {str(name) for name in pkg.exports or ()}
    expressions: list[Any] = [getattr(member, "annotation", None), getattr(member, "returns", None)]
    for function in (member, *(getattr(member, "overloads", None) or ())):
        expressions.append(getattr(function, "returns", None))
        expressions += [parameter.annotation for parameter in getattr(function, "parameters", ())]
    for expression in expressions:
        if isinstance(expression, griffe.Expr):
            for name in expression.iterate(flat=True):
                if isinstance(name, griffe.ExprName) and name.name.removeprefix(ALIAS) in public:
                    name.name = name.name.removeprefix(ALIAS)
                    name.parent = pkg


def mark_examples(thing: griffe.Object | griffe.Alias) -> None:
    """Lets an example be shown as one: griffe knows the section by its plural alone."""
    if thing.docstring is not None:
        thing.docstring.value = thing.docstring.value.replace("\nExample:\n", "\nExamples:\n")
