"""The examples run as `examples/README.md` says, and print what it shows. Tests of the lab run those that need it."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from needs import need, need_program
from vmm.machine import Machine
from vmm.pci import BAR0, COMMAND, MEMORY_SPACE, PciBus

PROJECT = Path(__file__).parents[2]
README = PROJECT / "examples" / "README.md"
EXAMPLES = dict(re.findall(r"^```console\n\$ python (.*)\n((?:.*\n)*?)```$", README.read_text(), re.MULTILINE))
PROGRAMS = {"-m examples.vhost_user_blk": "qemu-storage-daemon"}
"""What an example needs."""
ON_KVM = ["examples/minimal_device.py", "examples/async_device.py", "-m examples.vhost_user_blk"]


def output(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_its_readme_shows(example: str) -> None:
    if example in PROGRAMS:
        need_program(PROGRAMS[example])
    assert output(*example.split()) == EXAMPLES[example]


@pytest.mark.parametrize("example", ON_KVM)
def test_an_example_prints_the_same_on_kvm(example: str) -> None:
    need("kvm")
    if example in PROGRAMS:
        need_program(PROGRAMS[example])
    assert output(*example.split(), "kvm") == EXAMPLES[example]


def test_the_vmm_stops_its_vcpus_where_python_repeats_an_ioctl_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    ioctl = fcntl.ioctl

    def repeated(*arguments: Any) -> Any:
        """What Python does from 3.14 on."""
        while True:
            try:
                return ioctl(*arguments)
            except InterruptedError:
                continue

    monkeypatch.setattr(fcntl, "ioctl", repeated)
    with Machine(memory=1 << 20, cpus=1, output=lambda _: None) as machine:
        machine.vm.memory[:3] = b"\xf4\xeb\xfd"  # hlt, and again
        machine.vcpus[0].enter_at(0, 0)
        machine.stop()
        assert not machine.run()


def test_the_vmm_ignores_what_its_guest_writes_beyond_configuration_space() -> None:
    bus = PciBus()
    bus.write(0, (0x800000FC).to_bytes(4, "little"))
    bus.write(7, bytes([1, 2, 3, 4]))
    assert bus.read(4, 4) == 0


def test_the_vmm_goes_on_when_its_guest_puts_two_devices_at_one_address(tmp_path: Path) -> None:
    need("kvm")
    (tmp_path / "image").write_bytes(bytes(512))
    with Machine(memory=1 << 20, cpus=1, output=lambda _: None) as machine, (tmp_path / "image").open("r+b") as image:
        disks = [machine.add_disk(image.fileno(), vectors=1) for _ in range(2)]
        for disk in disks:
            disk.write_config(BAR0, (0xE0000000).to_bytes(4, "little"))
            disk.write_config(COMMAND, (MEMORY_SPACE).to_bytes(2, "little"))
        assert len(machine.partition.ioeventfds) == 1
        # A write to the second one's register, which no doorbell takes.
        disks[1].write_bar(0x3000, bytes(2))
        assert disks[1].kicks[0].consume() == 1
        disks[0].write_config(COMMAND, bytes(2))
        disks[1].write_config(BAR0, (0xE0100000).to_bytes(4, "little"))
        assert [doorbell.address for doorbell in machine.partition.ioeventfds] == [0xE0103000]


def test_the_readme_lists_every_example() -> None:
    there = {path.name for path in README.parent.iterdir()} - {README.name, "__pycache__"}
    listed = {name.rstrip("/") for name in re.findall(r"^\| `(\S+)` \|", README.read_text(), re.MULTILINE)}
    assert listed == there
    assert len(EXAMPLES) >= 3


def test_the_site_shows_every_source() -> None:
    sources = {str(path.relative_to(PROJECT)) for path in README.parent.rglob("*.py")}
    pages = "".join(page.read_text() for page in (PROJECT / "docs" / "examples").glob("*.md"))
    assert set(re.findall(r'^--8<-- "(\S+)"$', pages, re.MULTILINE)) == sources
