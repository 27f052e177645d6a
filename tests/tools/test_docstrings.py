"""The examples in docstrings run and print the output that they show."""

from __future__ import annotations

import doctest
import operator

import mshv_irqfd
import pytest

CLASSES = ["MsiRoute", "EventFd", "IoEventFd", "IrqFdRoute", "Batch", "MsixTable", "MsiCapability"]


@pytest.mark.parametrize(
    "name", [*CLASSES, "open_partition", "SimulatedPartition.wait_interrupts", "Partition.describe"]
)
def test_the_example_of_a_docstring_prints_what_it_shows(name: str) -> None:
    names = {public: getattr(mshv_irqfd, public) for public in mshv_irqfd.__all__}
    documented = operator.attrgetter(name)(mshv_irqfd)
    (test,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs=names)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0
