"""Loads a Linux kernel by its 32-bit boot protocol, and describes the machine to it.

The protocol is Linux's `Documentation/arch/x86/boot.rst`; the description is the MP table of Intel's MultiProcessor
Specification 1.4, which takes a page where ACPI takes a book.
"""

from __future__ import annotations

import struct
from typing import Final

BOOT_PARAMETERS: Final = 0x7000
COMMAND_LINE: Final = 0x20000
MP_TABLE: Final = 0x9FC00  # the last KiB of low memory: the kernel looks there
KERNEL: Final = 0x100000

_IO_APIC, _LOCAL_APIC = 0xFEC00000, 0xFEE00000
_RAM, _RESERVED = 1, 2
_EXTERNAL, _NMI = 3, 1


def load_linux(memory: memoryview, kernel: bytes, initrd: bytes, command_line: str, cpus: int) -> tuple[int, int]:
    """Puts a bzImage, an initramfs, the command line and the description into guest memory.

    Returns:
        The address to enter the kernel at, and the address for RSI.

    Raises:
        ValueError: `kernel` is not a bzImage, or the memory is too small. The message says which.
    """
    if len(kernel) < 0x1000 or kernel[0x202:0x206] != b"HdrS" or kernel[0x211] & 1 == 0:
        raise ValueError("the kernel is not a bzImage")
    (ceiling,) = struct.unpack_from("<I", kernel, 0x22C)  # of the initramfs
    (preferred, needed) = struct.unpack_from("<QI", kernel, 0x258)
    code = kernel[(kernel[0x1F1] + 1) * 512 :]
    end = max(KERNEL + len(code), max(KERNEL, preferred) + needed)  # it unpacks itself to where it prefers to be
    at = (min(len(memory), ceiling + 1) - len(initrd)) & ~0xFFF
    if at < end:
        raise ValueError(f"{len(memory)} bytes of memory: the kernel needs {end}, and the initramfs {len(initrd)} more")
    memory[KERNEL : KERNEL + len(code)] = code
    memory[at : at + len(initrd)] = initrd
    line = command_line.encode() + b"\0"
    memory[COMMAND_LINE : COMMAND_LINE + len(line)] = line

    parameters = bytearray(4096)
    header_end = 0x202 + kernel[0x201]
    parameters[0x1F1:header_end] = kernel[0x1F1:header_end]
    parameters[0x210] = 0xFF  # a loader without a number of its own
    struct.pack_into("<II", parameters, 0x218, at if initrd else 0, len(initrd))
    struct.pack_into("<I", parameters, 0x228, COMMAND_LINE)
    regions = [
        (0, MP_TABLE, _RAM),
        (MP_TABLE, KERNEL - MP_TABLE, _RESERVED),
        (KERNEL, len(memory) - KERNEL, _RAM),
    ]
    parameters[0x1E8] = len(regions)
    for number, region in enumerate(regions):
        struct.pack_into("<QQI", parameters, 0x2D0 + 20 * number, *region)
    memory[BOOT_PARAMETERS : BOOT_PARAMETERS + 4096] = bytes(parameters)

    table = _mp_table(cpus)
    memory[MP_TABLE : MP_TABLE + len(table)] = table
    return KERNEL, BOOT_PARAMETERS


def _mp_table(cpus: int) -> bytes:
    """One processor entry for each CPU, the IOAPIC, and the ISA interrupts at the pins of the same number."""
    io_apic = cpus  # its APIC id: the first that no CPU has
    entries = [struct.pack("<BBBBII8x", 0, cpu, 0x14, 3 if cpu == 0 else 1, 0x600, 0x201) for cpu in range(cpus)]
    entries.append(struct.pack("<BB6s", 1, 0, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, io_apic, 0x11, 1, _IO_APIC))
    entries += [struct.pack("<BBHBBBB", 3, 0, 0, 0, irq, io_apic, irq) for irq in range(16) if irq != 2]
    entries.append(struct.pack("<BBHBBBB", 4, _EXTERNAL, 0, 0, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, 0, 0, 0xFF, 1))
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        b"PCMP", 44 + len(body), 4, 0, b"MSHVIRQ ", b"EXAMPLE VMM ", 0, 0, len(entries), _LOCAL_APIC, 0, 0, 0,
    )  # fmt: skip
    pointer = struct.pack("<4sIBBB5x", b"_MP_", MP_TABLE + 16, 1, 4, 0)
    return _summed(pointer, 10) + _summed(header + body, 7)


def _summed(table: bytes, at: int) -> bytes:
    """The table with the byte that makes all its bytes add up to 0."""
    return table[:at] + bytes([-sum(table) & 0xFF]) + table[at + 1 :]
