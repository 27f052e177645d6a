"""The pytest plugin, in test runs of its own: fixtures, backends, and no cost where it is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import testing

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = testing.available_backends()


@pytest.fixture
def outcome(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Runs pytest on a file of tests."""

    def run(tests: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(tests)
        # Those that are slow to load, and of no use here.
        without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "hypothesispytest", "pytest-run-parallel")]
        return pytester.runpytest_subprocess(*without, "-W", "error", *options)

    return run


TESTS = """
    from mshv_irqfd import MsiRoute

    def test_one(irqfd_partition, irqfd_backend):
        assert irqfd_partition.backend == irqfd_backend
        assert irqfd_partition.stats().pushes == 0
        with irqfd_partition.new_irqfd_route() as route:
            route.set_msi(MsiRoute.fixed(0x41, apic_id=0))
        kept.append(irqfd_partition)

    def test_all_are_closed():
        assert all(partition.closed for partition in kept)

    kept = []
"""


def test_a_test_runs_on_each_backend_of_the_machine(outcome: Callable[..., pytest.RunResult]) -> None:
    result = outcome(TESTS, "-v")
    result.assert_outcomes(passed=len(HERE) + 1)
    result.stdout.fnmatch_lines([f"*::test_one[[]{name}[]] PASSED*" for name in HERE])


def test_named_backends_are_the_only_ones(outcome: Callable[..., pytest.RunResult]) -> None:
    result = outcome(TESTS, "-v", "--irqfd-backend=simulated", "--irqfd-backend", "simulated")
    result.assert_outcomes(passed=2)


def test_a_named_backend_that_is_missing_fails_the_test_with_the_remedy(
    outcome: Callable[..., pytest.RunResult],
) -> None:
    missing = [name for name in testing.BACKENDS if name not in HERE]
    if not missing:
        pytest.skip("this machine has every backend")
    result = outcome(TESTS, f"--irqfd-backend={missing[0]}")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"*HypervisorUnavailableError*/dev/{missing[0]}*"])


def test_an_unknown_backend_is_refused(outcome: Callable[..., pytest.RunResult]) -> None:
    result = outcome(TESTS, "--irqfd-backend=xen")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--irqfd-backend*xen*"])


def test_pytest_shows_the_failing_line_of_the_test_and_not_the_helpers_source(
    outcome: Callable[..., pytest.RunResult],
) -> None:
    tests = """
        from mshv_irqfd import MsiRoute
        from mshv_irqfd.testing import expect, expect_nothing

        def test_missing(simulated_partition):
            expect(simulated_partition, 0x41, timeout=0)

        def test_surplus(simulated_partition):
            simulated_partition.signal_msi(MsiRoute.fixed(0x42, apic_id=0))
            expect_nothing(simulated_partition)
    """
    result = outcome(tests)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            ">*expect(simulated_partition, 0x41, timeout=0)",
            "E*AssertionError: missing after 0 s: 1 x vector 0x41; *",
            ">*expect_nothing(simulated_partition)",
            "E*AssertionError: expected no interrupt; arrived: 1 x vector 0x42*",
        ]
    )
    result.stdout.no_fnmatch_line("*mshv_irqfd?testing.py*")


def test_each_test_gets_a_simulated_partition_of_its_own(outcome: Callable[..., pytest.RunResult]) -> None:
    tests = """
        import errno
        import pytest
        from mshv_irqfd import MsiRoute, RoutingError
        from mshv_irqfd.testing import expect, expect_nothing, failing

        @pytest.mark.parametrize("number", range(3))
        def test_one(simulated_partition, number):
            assert simulated_partition.routes == []
            expect_nothing(simulated_partition)
            with simulated_partition.new_irqfd_route() as route:
                with failing(simulated_partition, "set_msi_routing", errno.ENOMEM), pytest.raises(RoutingError):
                    route.set_msi(MsiRoute.fixed(0x41, apic_id=0))
                route.set_msi(MsiRoute.fixed(0x41, apic_id=0))
                route.signal()
                expect(simulated_partition, 0x41)

        def test_two(simulated_partition):
            simulated_partition.signal_msi(MsiRoute.fixed(0x42, apic_id=0))
            expect(simulated_partition, 0x41, timeout=0)
    """
    result = outcome(tests)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["E*AssertionError: missing after 0 s: 1 x vector 0x41; expected 1 x vector 0x41; arrived: 1 x vector 0x42*"]
    )


def test_the_fixtures_and_the_option_are_documented(outcome: Callable[..., pytest.RunResult]) -> None:
    mine = outcome("", "--fixtures").stdout.str().split("defined from pytest_mshv_irqfd", 1)[1].split("\n---", 1)[0]
    for name in ("irqfd_backend", "irqfd_partition", "simulated_partition"):
        assert name in mine
    assert "no docstring available" not in mine
    assert "--irqfd-backend" in outcome("", "--help").stdout.str()


def test_where_it_is_not_used_the_package_is_not_imported(outcome: Callable[..., pytest.RunResult]) -> None:
    tests = """
        import sys

        def test_nothing():
            assert "pytest_mshv_irqfd" in sys.modules
            assert "mshv_irqfd" not in sys.modules
    """
    outcome(tests).assert_outcomes(passed=1)


def test_it_can_be_turned_off(outcome: Callable[..., pytest.RunResult]) -> None:
    tests = """
        import sys

        def test_nothing():
            assert "pytest_mshv_irqfd" not in sys.modules

        def test_one(irqfd_partition):
            pass
    """
    result = outcome(tests, "-p", "no:mshv_irqfd")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'irqfd_partition' not found*"])
