"""The checks: what was found on a machine, what that means, and what fixes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mshv_irqfd import HypervisorUnavailableError, KvmPartition, MshvIrqFdError, MsiRoute, SimulatedPartition
from mshv_irqfd.handles import DEFAULT_GSIS, open_partition

if TYPE_CHECKING:
    from collections.abc import Callable

    from mshv_irqfd._cli.doctor.machine import Machine, Node


BACKENDS: Final = ("mshv", "kvm", "simulated")
VECTOR: Final = 0x41
TIMEOUT: Final = 10.0
"""Seconds after which an interrupt counts as lost."""
FILES: Final = len(DEFAULT_GSIS) + 64
"""Descriptors of a process with every default GSI in use: one a route, and some for everything else."""
UNREADABLE: Final = "its configuration can't be read"
OLDEST: Final = (4, 14)
"""MADV_WIPEONFORK."""
MSHV_DRAINS: Final = (7, 0)
"""From this version on, disarming an irqfd on mshv drains it. Before, the package does it alone."""


@dataclass(frozen=True)
class Check:
    """A finding."""

    subject: str
    status: Literal["ok", "warning", "missing"]
    found: str
    remedy: str | None = None


def all_of(machine: Machine) -> list[Check]:
    """Every check."""
    return [
        kernel(machine),
        files(machine),
        *(device(machine, name) for name in ("mshv", "kvm")),
        *(works(machine, name) for name in BACKENDS),
    ]


def kernel(machine: Machine) -> Check:
    """The kernel's version and configuration."""
    numbers = re.match(r"(\d+)\.(\d+)", machine.kernel)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    options = ", ".join(f"{name}={value}" for name, value in machine.config.items())
    found = f"Linux {machine.kernel}; {options or UNREADABLE}"
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Check("kernel", "missing", found, f"the package needs Linux {oldest} or later: boot a newer kernel")
    if machine.nodes["mshv"].exists and version < MSHV_DRAINS:
        return Check(
            "kernel",
            "warning",
            f"{found}; its mshv driver does not drain what it disarms, which the package makes good",
            "see what else differs: mshv-irqfd probe --backend mshv",
        )
    return Check("kernel", "ok", found)


def files(machine: Machine) -> Check:
    """The limit of open files: every route is one."""
    soft, hard = machine.files
    found = f"RLIMIT_NOFILE {soft}, at most {hard}"
    if not 0 <= soft < FILES:
        return Check("open files", "ok", found)
    why = f"{found}: {len(DEFAULT_GSIS)} routes need {FILES}"
    if not 0 <= hard < FILES:
        return Check("open files", "warning", why, f"ulimit -n {FILES}")
    return Check("open files", "warning", why, f"as root: prlimit --pid $$ --nofile={FILES}")


def device(machine: Machine, name: str) -> Check:
    """A device node and its permissions."""
    subject, node = f"/dev/{name}", machine.nodes[name]
    if not node.exists:
        return Check(subject, "missing", "there is no such device", _no_node(machine, name))
    rights = "may" if node.ours else "may not"
    found = f"group {node.group}; {machine.user} {rights} read and write"
    if not node.ours:
        return Check(subject, "missing", found, _no_access(machine, node))
    return Check(subject, "ok", found)


def _no_node(machine: Machine, name: str) -> str:
    if name == "mshv":
        if machine.config.get("CONFIG_MSHV_ROOT") == "m" and "mshv_root" not in machine.modules:
            return "modprobe mshv_root   # if Linux is the root partition of the Microsoft Hypervisor"
        return "it appears where Linux is the root partition of the Microsoft Hypervisor, with CONFIG_MSHV_ROOT"
    module = {"vmx": "kvm_intel", "svm": "kvm_amd"}
    for flag, driver in module.items():
        if flag in machine.flags:
            return f"modprobe {driver}"
    if "hypervisor" in machine.flags:
        return "this is a virtual machine without nested virtualization: turn that on in the hypervisor above"
    return "turn virtualization (VT-x, AMD-V) on in the firmware, then: modprobe kvm_intel || modprobe kvm_amd"


def _no_access(machine: Machine, node: Node) -> str:
    if node.group_may and node.group != "root":
        return f"usermod --append --groups {node.group} {machine.user}   # as root; then log in again"
    return f"setfacl --modify u:{machine.user}:rw {node.path}   # as root"


def works(machine: Machine, name: str, deliver: Callable[[str], str] | None = None) -> Check:
    """Whether a backend delivers interrupts, by trying."""
    node = machine.nodes.get(name)
    if node is not None and not (node.exists and node.ours):
        return Check(name, "missing", f"not tried: see {node.path}")
    try:
        return Check(name, "ok", (deliver or deliver_one)(name))
    except HypervisorUnavailableError as error:
        return Check(name, "missing", str(error.strerror), error.hint)
    except LostInterruptError as error:
        return Check(name, "missing", str(error), f"see what differs: mshv-irqfd probe --backend {name}")
    except MshvIrqFdError as error:
        return Check(name, "missing", str(error), getattr(error, "hint", None))


class LostInterruptError(Exception):
    """An interrupt did not arrive."""


def deliver_one(name: str) -> str:
    """Makes a partition and signals a route. Returns what that showed."""
    with open_partition(name) as partition, partition.new_irqfd_route() as route:
        route.set_msi(MsiRoute.fixed(VECTOR, 0))
        route.signal()
        if not isinstance(partition, KvmPartition | SimulatedPartition):
            return "a partition was made, and a route armed and signalled (no mshv host tells what a guest got)"
        arrived = [interrupt.vector for interrupt in partition.take_interrupts(TIMEOUT)]
    if arrived != [VECTOR]:
        raise LostInterruptError(f"signalled vector {VECTOR:#04x}, and {arrived} arrived")
    return "a partition was made, and an interrupt delivered"
