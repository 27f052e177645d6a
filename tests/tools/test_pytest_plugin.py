"""The pytest plugin, in test runs of its own: fixtures, backends, and no cost where it is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_mshv_irqfd
from mshv_irqfd import testing

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = testing.available_backends()


MISSING = [name for name in testing.BACKENDS if name not in HERE]


@pytest.fixture
def outcome(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs pytest on a file of tests."""
    monkeypatch.delenv("MSHV_IRQFD_BACKENDS", raising=False)

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


needs_a_missing_one = pytest.mark.skipif(not MISSING, reason="this machine has every backend")


@needs_a_missing_one
def test_a_named_backend_that_is_missing_fails_the_test_with_the_remedy(
    outcome: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = outcome(TESTS, f"--irqfd-backend={MISSING[0]}")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"--irqfd-backend={MISSING[0]} asks for this backend: */dev/{MISSING[0]}*"])
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", MISSING[0])
    result = outcome(TESTS)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"MSHV_IRQFD_BACKENDS asks for {MISSING[0]}: */dev/{MISSING[0]}*"])


def test_the_environment_names_backends_too_and_the_option_is_stronger(
    outcome: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", "simulated")
    outcome(TESTS).assert_outcomes(passed=2)
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", "kvm")
    outcome(TESTS, "-v", "--irqfd-backend=simulated").assert_outcomes(passed=2)
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", "xen")
    result = outcome(TESTS)
    assert result.ret != pytest.ExitCode.OK
    assert "MSHV_IRQFD_BACKENDS names xen; the backends are simulated, kvm, mshv" in result.stdout.str()


SETTING = """
    [pytest]
    irqfd_backends = simulated {}
"""


@needs_a_missing_one
def test_where_the_setting_names_a_missing_backend_its_tests_are_skipped_and_say_so(
    outcome: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    pytester.makeini(SETTING.format(MISSING[0]))
    result = outcome(TESTS, "-rs")
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED*: {MISSING[0]} is missing on this machine: `mshv-irqfd doctor` tells why"])


def test_the_option_chooses_among_those_of_the_setting(
    outcome: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    pytester.makeini(SETTING.format("kvm"))
    outcome(TESTS, "--irqfd-backend=simulated").assert_outcomes(passed=2)
    result = outcome(TESTS, "-rs", "--irqfd-backend=mshv")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*: the test is for simulated, kvm, which --irqfd-backend leaves out"])


FOR_ONE = """
    import pytest

    @pytest.mark.irqfd_backends("simulated")
    def test_one(irqfd_partition):
        assert irqfd_partition.backend == "simulated"
"""


def test_a_test_may_be_for_some_backends_alone(outcome: Callable[..., pytest.RunResult]) -> None:
    outcome(FOR_ONE, "--strict-markers").assert_outcomes(passed=1)
    result = outcome(FOR_ONE, "-rs", "--irqfd-backend=kvm")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*: the test is for simulated, which --irqfd-backend leaves out"])


def test_an_unknown_name_of_the_marker_or_the_setting_is_refused(
    outcome: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    result = outcome(FOR_ONE.replace('("simulated")', '("xen")'))
    assert result.ret != pytest.ExitCode.OK
    assert "the marker irqfd_backends names 'xen'; the backends are simulated, kvm, mshv" in result.stdout.str()
    pytester.makeini(SETTING.format("xen"))
    result = outcome(TESTS)
    assert result.ret != pytest.ExitCode.OK
    assert "the setting irqfd_backends names 'xen'; the backends are simulated, kvm, mshv" in result.stdout.str()


def test_the_plugin_knows_every_backend_without_importing_the_package() -> None:
    assert pytest_mshv_irqfd.BACKENDS == testing.BACKENDS


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
