"""The examples in the docstrings do what they show."""

from __future__ import annotations

import doctest

import mshv_irqfd
import pytest


@pytest.mark.parametrize("name", ["MsiRoute", "EventFd", "IrqFdRoute", "Batch", "open_partition"])
def test_an_example_shows_what_happens(name: str) -> None:
    names = {public: getattr(mshv_irqfd, public) for public in mshv_irqfd.__all__}
    (test,) = doctest.DocTestFinder(recurse=False).find(names[name], name, globs=names)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0
