"""The pytest plugin of mshv_irqfd: partitions as fixtures.

It is a package of its own because pytest loads it in every run: it imports nothing but pytest until a fixture is used.
`-p no:mshv_irqfd` turns it off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mshv_irqfd import Partition, SimulatedPartition

BACKENDS = ("simulated", "kvm", "mshv")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--irqfd-backend`."""
    parser.getgroup("mshv_irqfd").addoption(
        "--irqfd-backend",
        action="append",
        choices=BACKENDS,
        metavar="NAME",
        help="run the tests that use irqfd_backend or irqfd_partition on this backend (simulated, kvm or mshv; may be "
        "repeated), and fail them where it is missing. Default: on each backend that this machine has",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that uses `irqfd_backend` on each backend."""
    if "irqfd_backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("irqfd_backend")
        if names is None:
            from mshv_irqfd import testing  # noqa: PLC0415 -- only where it is used

            names = testing.available_backends()
        metafunc.parametrize("irqfd_backend", list(dict.fromkeys(names)), indirect=True, scope="session")


@pytest.fixture(scope="session")
def irqfd_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn: those of --irqfd-backend, or all that this machine has."""
    return str(request.param)


@pytest.fixture
def irqfd_partition(irqfd_backend: str) -> Iterator[Partition]:
    """A new partition with one VP on each backend in turn, closed after the test."""
    from mshv_irqfd import open_partition  # noqa: PLC0415 -- only where it is used

    with open_partition(irqfd_backend) as partition:
        yield partition


@pytest.fixture
def simulated_partition() -> Iterator[SimulatedPartition]:
    """A new simulated partition with one VP, closed after the test."""
    from mshv_irqfd import open_partition  # noqa: PLC0415 -- only where it is used

    with open_partition("simulated") as partition:
        yield partition
