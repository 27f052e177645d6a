"""What there is on this machine: nodes, permissions, kernel, limits."""

from __future__ import annotations

import gzip
import os
import platform
import resource
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

CONFIGS: Final = ("CONFIG_EVENTFD", "CONFIG_KVM", "CONFIG_KVM_INTEL", "CONFIG_KVM_AMD", "CONFIG_MSHV_ROOT")
MODULES: Final = ("kvm", "kvm_intel", "kvm_amd", "mshv_root")


@dataclass(frozen=True)
class Node:
    """A device node."""

    path: str
    group: str | None = None
    """The name of its group; None if there is no node."""
    group_may: bool = False
    """Whether its group may read and write."""
    ours: bool = False
    """Whether this process may read and write."""

    @property
    def exists(self) -> bool:
        """Whether there is such a character device."""
        return self.group is not None


@dataclass(frozen=True)
class Machine:
    """What the checks look at."""

    python: str
    kernel: str
    user: str
    nodes: dict[str, Node]
    modules: tuple[str, ...]
    """Those of `MODULES` that are loaded or built in."""
    flags: tuple[str, ...]
    """Of the processor: vmx, svm, hypervisor."""
    config: dict[str, str] = field(default_factory=dict)
    """Of `CONFIGS`: y, m or n. Empty if the kernel's configuration can't be read."""
    files: tuple[int, int] = (1024, 4096)
    """RLIMIT_NOFILE: soft, hard."""


def look() -> Machine:
    """Looks at this machine."""
    return Machine(
        python=platform.python_version(),
        kernel=platform.release(),
        user=_user(),
        nodes={name: node(Path("/dev") / name) for name in ("mshv", "kvm")},
        modules=tuple(name for name in MODULES if Path("/sys/module", name).exists()),
        flags=flags(_read(Path("/proc/cpuinfo"))),
        config=config(_kernel_config()),
        files=resource.getrlimit(resource.RLIMIT_NOFILE),
    )


def node(path: Path) -> Node:
    """Looks at a device node."""
    try:
        found = path.stat()
    except OSError:
        return Node(str(path))
    if not stat.S_ISCHR(found.st_mode):
        return Node(str(path))
    both = stat.S_IRGRP | stat.S_IWGRP
    ours = os.access(path, os.R_OK | os.W_OK)
    return Node(str(path), _group(found.st_gid), group_may=found.st_mode & both == both, ours=ours)


def flags(cpuinfo: str) -> tuple[str, ...]:
    """The processor's flags that matter here."""
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            words = set(line.split())
            return tuple(flag for flag in ("vmx", "svm", "hypervisor") if flag in words)
    return ()


def config(text: str | None) -> dict[str, str]:
    """The options that matter here, of a kernel's configuration."""
    if text is None:
        return {}
    lines = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    options = {name: value for name, _, value in lines}
    return {name: options.get(name, "n") for name in CONFIGS}


def _kernel_config() -> str | None:
    try:
        return gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        pass
    release = platform.release()
    for path in (Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}/config")):
        if text := _read(path):
            return text
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _group(number: int) -> str:
    import grp  # noqa: PLC0415 -- of no other use

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _user() -> str:
    import pwd  # noqa: PLC0415 -- of no other use

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
