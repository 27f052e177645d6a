"""Saves a stopped machine to a directory, and makes it again from there in another process.

The page "Saved state" has the order to keep: with the CPUs and the devices stopped, the devices' interrupts are saved
first, and then the CPUs' local APICs, which have every interrupt that is not among them.
"""

from __future__ import annotations

import fcntl
import json
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from .machine import Machine

# Requests to read and to write one structure: by name, their numbers and its size.
_VM: Final = {
    "pit": (0x8070AE9F, 0x4070AEA0, 112),
    "clock": (0x8030AE7C, 0x4030AE7B, 48),
}
_IRQCHIP: Final = (0xC208AE62, 0x8208AE63, 520)
_VCPU: Final = {  # in the order of restoring: modes before what depends on them
    "special": (0x8138AE83, 0x4138AE84, 312),
    "registers": (0x8090AE81, 0x4090AE82, 144),
    "fpu": (0x81A0AE8C, 0x41A0AE8D, 416),
    "debug": (0x8080AEA1, 0x4080AEA2, 128),
    "lapic": (0x8400AE8E, 0x4400AE8F, 1024),
    "events": (0x8040AE9F, 0x4040AEA0, 64),
    "mp_state": (0x8004AE98, 0x4004AE99, 4),
}
_GET_MSR_INDEX_LIST, _GET_MSRS, _SET_MSRS = 0xC004AE02, 0xC008AE88, 0x4008AE89
_TSC_DEADLINE: Final = 0x6E0


def save(machine: Machine, directory: Path) -> None:
    """Saves a machine that has stopped."""
    directory.mkdir(parents=True, exist_ok=True)
    vm = machine.vm
    state = {
        "disks": [disk.save() for disk in machine.disks],
        "partition": machine.partition.save(),
        "serial": machine.serial.save(),
        "bus": machine.bus.save(),
        "vcpus": [
            {name: _get(vcpu.fileno(), call).hex() for name, call in _VCPU.items()}
            | {"msrs": _get_msrs(machine.vm.kvm, vcpu.fileno())}
            for vcpu in machine.vcpus
        ],
        "irqchips": [_get(vm.fileno(), _IRQCHIP, struct.pack("<I", chip)).hex() for chip in range(3)],
        "vm": {name: _get(vm.fileno(), call).hex() for name, call in _VM.items()},
    }
    (directory / "memory").write_bytes(vm.memory)
    (directory / "state.json").write_text(json.dumps(state))


def restore(machine: Machine, directory: Path) -> None:
    """Gives a new machine with as many CPUs and disks the state of a saved one."""
    state = json.loads((directory / "state.json").read_text())
    vm = machine.vm
    with (directory / "memory").open("rb") as memory:
        if memory.readinto(vm.memory) != len(vm.memory) or memory.read(1):
            raise ValueError(f"{directory} was saved with another size of memory")
    for name, call in _VM.items():
        if name == "clock":  # the guest's clock goes on where it stopped
            (nanoseconds,) = struct.unpack_from("<Q", bytes.fromhex(state["vm"][name]))
            fcntl.ioctl(vm.fileno(), call[1], struct.pack("<Q40x", nanoseconds))
        else:
            fcntl.ioctl(vm.fileno(), call[1], bytes.fromhex(state["vm"][name]))
    for chip in state["irqchips"]:
        fcntl.ioctl(vm.fileno(), _IRQCHIP[1], bytes.fromhex(chip))
    for vcpu, saved in zip(machine.vcpus, state["vcpus"], strict=True):
        msrs = dict(saved["msrs"])
        deadline = msrs.pop(_TSC_DEADLINE)
        _set_msrs(vm.kvm, vcpu.fileno(), msrs)
        for name, call in _VCPU.items():
            fcntl.ioctl(vcpu.fileno(), call[1], bytes.fromhex(saved[name]))
        _set_msrs(vm.kvm, vcpu.fileno(), {_TSC_DEADLINE: deadline})  # the local APIC has its timer's mode now
    machine.serial.restore(state["serial"])
    machine.bus.restore(state["bus"])
    for disk, saved in zip(machine.disks, state["disks"], strict=True):
        disk.restore(saved)
    # A kick may have been on its way: each doorbell rings once.
    machine.partition.restore(state["partition"], ring_doorbells=True)


def _get(fd: int, call: tuple[int, int, int], start: bytes = b"") -> bytes:
    structure = bytearray(start.ljust(call[2], b"\0"))
    fcntl.ioctl(fd, call[0], structure)
    return bytes(structure)


def _get_msrs(kvm: int, vcpu: int) -> list[tuple[int, int]]:
    """All model-specific registers that KVM lists and this vCPU has."""
    listed = bytearray(struct.pack("<I", 1000) + bytes(4000))
    fcntl.ioctl(kvm, _GET_MSR_INDEX_LIST, listed)
    (number,) = struct.unpack_from("<I", listed)
    found = []
    for index in struct.unpack_from(f"<{number}I", listed, 4):
        request = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        if fcntl.ioctl(vcpu, _GET_MSRS, request) == 1:
            found.append((index, struct.unpack_from("<Q", request, 16)[0]))
    return found


def _set_msrs(kvm: int, vcpu: int, msrs: dict[int, int]) -> None:
    """Sets those registers that differ."""
    now = dict(_get_msrs(kvm, vcpu))
    for index, value in msrs.items():
        request = struct.pack("<IIIIQ", 1, 0, index, 0, value)
        if now.get(index) != value and _number(vcpu, _SET_MSRS, request) != 1:
            raise ValueError(f"KVM does not take {value:#x} for the register {index:#x}, which had it when saved")


def _number(fd: int, call: int, structure: bytes) -> int:
    """The number that an ioctl returns, which Python tells only of a structure that may change."""
    number: int = fcntl.ioctl(fd, call, bytearray(structure))
    return number
