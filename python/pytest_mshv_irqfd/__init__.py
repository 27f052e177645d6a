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
# An option's name, an ini option's, and a marker's.
OPTION, NAME = "--irqfd-backend", "irqfd_backends"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--irqfd-backend` and the setting `irqfd_backends`."""
    parser.getgroup("mshv_irqfd").addoption(
        OPTION,
        action="append",
        choices=BACKENDS,
        metavar="NAME",
        help="run the tests that use irqfd_backend or irqfd_partition on this backend (simulated, kvm or mshv; may be "
        "repeated), and fail them where it is missing. Default: those that MSHV_IRQFD_BACKENDS of the environment "
        "names with commas between, else those of the setting irqfd_backends, else each that this machine has",
    )
    parser.addini(
        NAME,
        "the backends that the tests of irqfd_backend and irqfd_partition are for: where one is missing they are "
        "skipped, and the reason is told. Default: those that the machine has",
        type="args",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describes the marker `irqfd_backends`."""
    config.addinivalue_line(
        "markers", f"{NAME}(*names): the backends that a test of irqfd_backend or irqfd_partition is for"
    )


@pytest.hookimpl(tryfirst=True)  # so that a test's name begins with the backend
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that uses `irqfd_backend` on each backend."""
    if "irqfd_backend" in metafunc.fixturenames:
        metafunc.parametrize("irqfd_backend", _backends(metafunc), indirect=True, scope="session")


def _backends(metafunc: pytest.Metafunc) -> list[object]:
    """The parameters of a test: the backends to run it on."""
    from mshv_irqfd import testing  # noqa: PLC0415 -- only where it is used

    marker = metafunc.definition.get_closest_marker(NAME)
    source, its = (
        (f"the marker {NAME}", marker.args) if marker else (f"the setting {NAME}", metafunc.config.getini(NAME))
    )
    if unknown := [repr(name) for name in its if name not in BACKENDS]:
        raise pytest.Collector.CollectError(
            f"{source} names {', '.join(unknown)}; the backends are {', '.join(BACKENDS)}"
        )
    required = metafunc.config.getoption("irqfd_backend")
    chooser = OPTION if required else "MSHV_IRQFD_BACKENDS"
    try:
        required = required or testing.required_backends()
    except ValueError as error:
        raise pytest.Collector.CollectError(str(error)) from None
    names = list(dict.fromkeys(required or its or testing.available_backends()))
    left = [name for name in names if not its or name in its]
    if left:
        return left
    skip = pytest.mark.skip(reason=f"the test is for {', '.join(its)}, which {chooser} leaves out")
    return [pytest.param(its[0], marks=skip)]


@pytest.fixture(scope="session")
def irqfd_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn: all that this machine has, or those that were chosen.

    --irqfd-backend, MSHV_IRQFD_BACKENDS, the setting irqfd_backends and the marker irqfd_backends choose.
    """
    from mshv_irqfd import testing  # noqa: PLC0415 -- only where it is used

    name = str(request.param)
    if reason := testing.unavailable(name):
        if request.config.getoption("irqfd_backend"):
            pytest.fail(f"{OPTION}={name} asks for this backend: {reason}", pytrace=False)
        if name in testing.required_backends():
            pytest.fail(f"MSHV_IRQFD_BACKENDS asks for {name}: {reason}", pytrace=False)
        pytest.skip(f"{name} is missing on this machine: `mshv-irqfd doctor` tells why")
    return name


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
