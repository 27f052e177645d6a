"""`make parallel`: each thread of a test has its own fixtures, and tests of process-wide state run in one thread."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import run_python

ROOT = Path(__file__).parents[2]
RULES = ROOT / "tests" / "rules"
# It counts the pushes of its partition, so it fails if two threads share one.
SHARED = "4_no_push_without_need/test_pushes.py::test_a_batch_is_one_push"
ALONE = [
    (
        "5_only_the_owner_acts/test_fork.py::test_a_child_can_not_commit_its_parents_batch",
        "calls thread-unsafe function: in_child",
    ),
    (
        "5_only_the_owner_acts/test_finalizers.py::test_closed_objects_are_dropped_without_a_warning",
        "calls thread-unsafe function: recorded",
    ),
    (
        "6_no_waiting_while_attached/test_waiting.py::test_the_interpreter_runs_on_while_a_batch_is_committed",
        "uses thread-unsafe fixture(s)",
    ),
]


@pytest.fixture(scope="module")
def report() -> str:
    """The output of pytest on these tests, in two threads on the simulated backend."""
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--parallel-threads=2"]
    run = subprocess.run(
        [*words, *(str(RULES / test) for test in (SHARED, *(test for test, _ in ALONE)))],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "MSHV_IRQFD_BACKENDS": "simulated"},
    )  # fmt: skip
    return run.stdout


def outcome(report: str, test: str) -> str:
    (line,) = [
        line for line in report.splitlines() if f"{test}[simulated]" in line and ("PASS" in line or "FAIL" in line)
    ]
    return line


def test_each_thread_that_runs_a_test_has_its_own_fixtures(report: str) -> None:
    assert "PARALLEL PASSED" in outcome(report, SHARED)


@pytest.mark.parametrize(("test", "reason"), ALONE, ids=[test for test, _ in ALONE])
def test_a_test_of_process_wide_state_runs_in_one_thread(report: str, test: str, reason: str) -> None:
    assert f"PASSED [thread-unsafe]: {reason}" in outcome(report, test)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a Python without the GIL: run `make free-threaded`"
)
def test_importing_the_package_leaves_the_gil_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # With this variable set the GIL stays off, whatever a module declares.
    monkeypatch.delenv("PYTHON_GIL", raising=False)
    ended = run_python("import mshv_irqfd, sys; print(sys._is_gil_enabled())", "-W", "error")
    assert (ended.stdout, ended.stderr) == ("False\n", "")
