"""`mshv-irqfd doctor`: what it makes of a machine, and its exit status."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from mshv_irqfd import HypervisorUnavailableError, IrqFdError
from mshv_irqfd._cli import main
from mshv_irqfd._cli.doctor import checks
from mshv_irqfd._cli.doctor import machine as machine_
from mshv_irqfd._cli.doctor.machine import Machine, Node

FINE = Machine(
    python="3.11.0",
    kernel="7.2.13",
    user="someone",
    nodes={name: Node(f"/dev/{name}", "kvm", group_may=True, ours=True) for name in ("mshv", "kvm")},
    modules=("kvm", "kvm_intel", "mshv_root"),
    flags=("vmx",),
    config=dict.fromkeys(machine_.CONFIGS, "y"),
    files=(4096, 4096),
)


def without(name: str, **changes: object) -> Machine:
    return replace(FINE, nodes=FINE.nodes | {name: Node(f"/dev/{name}")}, **changes)  # type: ignore[arg-type]


def shut(name: str, group: str, *, group_may: bool) -> Machine:
    return replace(FINE, nodes=FINE.nodes | {name: Node(f"/dev/{name}", group, group_may=group_may)})


@pytest.mark.parametrize(
    ("machine", "remedy"),
    [
        (without("kvm"), "modprobe kvm_intel"),
        (without("kvm", flags=("svm",)), "modprobe kvm_amd"),
        (without("kvm", flags=("hypervisor",)), "nested virtualization"),
        (without("kvm", flags=()), "in the firmware"),
        (shut("kvm", "kvm", group_may=True), "usermod --append --groups kvm someone"),
        (shut("kvm", "root", group_may=True), "setfacl --modify u:someone:rw /dev/kvm"),
        (shut("kvm", "kvm", group_may=False), "setfacl --modify u:someone:rw /dev/kvm"),
    ],
)
def test_a_missing_kvm_has_the_remedy_of_its_cause(machine: Machine, remedy: str) -> None:
    check = checks.device(machine, "kvm")
    assert check.status == "missing"
    assert check.remedy is not None
    assert remedy in check.remedy
    assert checks.works(machine, "kvm", deliver).found == "not tried: see /dev/kvm"


def deliver(_name: str) -> NoReturn:
    raise AssertionError("tried")


def test_a_missing_mshv_is_a_module_or_another_host() -> None:
    module = without("mshv", config={"CONFIG_MSHV_ROOT": "m"}, modules=())
    assert str(checks.device(module, "mshv").remedy).startswith("modprobe mshv_root")
    assert "root partition" in str(checks.device(without("mshv"), "mshv").remedy)


def test_a_device_that_may_be_used_is_fine() -> None:
    assert [checks.device(FINE, name).status for name in FINE.nodes] == ["ok", "ok"]


def test_a_low_limit_of_open_files_has_a_command_if_the_hard_limit_allows_it() -> None:
    assert checks.files(FINE).status == "ok"
    assert checks.files(replace(FINE, files=(-1, -1))).status == "ok"
    low = checks.files(replace(FINE, files=(1024, 4096)))
    assert (low.status, low.remedy) == ("warning", "ulimit -n 2112")
    assert "prlimit" in str(checks.files(replace(FINE, files=(1024, 1024))).remedy)


def test_an_old_kernel_is_told_apart_from_an_old_mshv_driver() -> None:
    assert checks.kernel(FINE).status == "ok"
    assert checks.kernel(replace(FINE, kernel="4.9.0")).status == "missing"
    assert checks.kernel(replace(FINE, kernel="6.18.1")).status == "warning"
    assert checks.kernel(without("mshv", kernel="6.18.1")).status == "ok"
    assert "can't be read" in checks.kernel(replace(FINE, config={})).found


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (HypervisorUnavailableError(errno.ENOTTY, "no device of kvm", hint="give another node"), "give another node"),
        (IrqFdError(errno.EMFILE, "no files", hint="raise it"), "raise it"),
        (checks.LostInterruptError("nothing arrived"), "see what differs: mshv-irqfd probe --backend kvm"),
    ],
)
def test_a_backend_that_fails_is_missing_with_a_remedy(error: Exception, remedy: str) -> None:
    def failing(_name: str) -> NoReturn:
        raise error

    check = checks.works(FINE, "kvm", failing)
    assert (check.status, check.remedy) == ("missing", remedy)


def test_of_a_configuration_the_options_that_matter_are_kept() -> None:
    found = machine_.config("# CONFIG_KVM_AMD is not set\nCONFIG_KVM=m\nCONFIG_EVENTFD=y\nCONFIG_OTHER=y\n")
    assert found == dict.fromkeys(machine_.CONFIGS, "n") | {"CONFIG_KVM": "m", "CONFIG_EVENTFD": "y"}
    assert machine_.config(None) == {}


def test_of_the_processor_the_flags_that_matter_are_kept() -> None:
    assert machine_.flags("model: x\nflags\t\t: fpu svm hypervisor\n") == ("svm", "hypervisor")
    assert machine_.flags("") == ()


def test_a_node_is_a_character_device(tmp_path: Path) -> None:
    assert not machine_.node(tmp_path / "none").exists
    (tmp_path / "file").touch()
    assert not machine_.node(tmp_path / "file").exists
    null = machine_.node(Path("/dev/null"))
    assert (null.exists, null.group, null.ours) == (True, "root", True)


def test_the_simulated_backend_works_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--backend", "simulated"]) == 0
    shown = capsys.readouterr().out
    assert "ok      simulated: a partition was made, and an interrupt delivered" in shown
    assert "Works here:" in shown


@pytest.mark.parametrize("backend", ["mshv", "kvm"])
def test_the_exit_status_says_whether_a_backend_works(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    has = os.access(f"/dev/{backend}", os.R_OK | os.W_OK)
    assert main(["doctor", "--backend", backend, "--json"]) == (0 if has else 1)
    report = json.loads(capsys.readouterr().out)
    assert report["works"][backend] is has
    assert report["machine"]["kernel"] == platform.release()
    assert all(
        check["remedy"] for check in report["checks"] if check["status"] == "missing" and "/" in check["subject"]
    )


def test_the_page_describes_every_key_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--backend", "simulated", "--json"])
    report = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "reference" / "command-line.md").read_text()
    rows = re.findall(r"(?m)^\| (`.*`) \| (.*) \|$", page)
    told = {name for names, _ in rows for name in re.findall(r"`([^`]+)`", names)}
    machine = report.pop("machine")
    assert told == {*report, *(f"machine.{key}" for key in machine)}
    (about_checks,) = (text for names, text in rows if names == "`checks`")
    assert all(f"`{key}`" in about_checks for check in report["checks"] for key in check)
    (about_nodes,) = (text for names, text in rows if names == "`machine.nodes`")
    assert all(f"`{key}`" in about_nodes for node in machine["nodes"].values() for key in node)
    assert report["format"] == 1
    assert set(report["works"]) == {"mshv", "kvm", "simulated"}
    assert {check["status"] for check in report["checks"]} <= {"ok", "warning", "missing"}
