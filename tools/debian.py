"""Runs the built wheel on the CPythons of other Debian releases, or builds the crate with the Rust of the oldest one.

usage: python tools/debian.py pythons [VERSION...] [-- PYTEST_ARGUMENT...]     (needs dist/: `make wheel`)
       python tools/debian.py rust

Each release is unpacked into a root of its own, of packages from the archive that apt uses here, and kept in
~/.cache/mshv_irqfd/roots (or under $XDG_CACHE_HOME), which may be deleted at any time. A CPython gets a fresh virtual
environment that holds the wheel, pytest and what the tests import, and runs the tests from a copy: unless others are
named, those of the API and of its rules.

Needs root, for chroot(2) and mounts, and Debian's mmdebstrap, which it installs if it is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mshv_irqfd" / "roots"


@dataclass(frozen=True)
class Suite:
    """A Debian release, and what is used of it."""

    name: str
    pythons: tuple[str, ...]
    packages: tuple[str, ...] = ()


SUITES = (
    Suite("bookworm", ("3.11",)),
    Suite("trixie", ("3.13",), ("rustc", "cargo", "gcc", "libc6-dev")),
    Suite("sid", ("3.14", "3.15")),
)
RUST = "trixie"
"""The release whose rustc is the oldest that the crate must build with."""

TESTED = (
    "hypothesis",
    "iniconfig",
    "packaging",
    "pluggy",
    "Pygments",
    "pytest",
    "pytest-run-parallel",
    "pytest-timeout",
    "sortedcontainers",
)
"""What the tests import, of requirements-dev.txt. None of it has to be compiled."""

OPTIONAL = {"uvloop": "tests/behaviour/test_waiting_async.py"}
"""Compiled packages, which may lack a wheel for a new CPython, and the tests that are left out then."""

TESTS = ("tests", "tools", "docs", "examples", "README.md", "CHANGELOG.md", "Cargo.toml", "Makefile", "pyproject.toml")
CHOSEN = ("tests/behaviour", "tests/pci", "tests/rules", "tests/saved")
"""The tests that are run unless others are named: the API and its rules, without programs, pages and long walks."""


def run(*command: str | Path, **environment: str) -> None:
    """Runs a command. Ends this program if it fails."""
    done = subprocess.run([str(part) for part in command], check=False, env=os.environ | environment)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def archive() -> str:
    """The Debian archive that apt is configured with."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]
    for again in (True, False):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
        for line in shown.splitlines():
            label, _, uri = line.partition(" ")
            if label == "Debian":
                return uri
        if again:
            run("apt-get", "-q", "update")
    raise SystemExit("apt has no Debian archive configured")


def root_of(suite: Suite) -> Path:
    """The root of a release, made the first time."""
    packages = [package for python in suite.pythons for package in (f"python{python}", f"python{python}-venv")]
    include = ",".join((*packages, *suite.packages, "mount"))  # a test mounts
    root = CACHE / f"{suite.name}-{hashlib.sha256(include.encode()).hexdigest()[:8]}"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    if not shutil.which("mmdebstrap"):
        run("apt-get", "-q", "update")
        run("apt-get", "-qy", "install", "--no-install-recommends", "mmdebstrap", DEBIAN_FRONTEND="noninteractive")
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        new = Path(work) / "root"
        # A mirror may be kept as it was some weeks ago. Signatures are checked all the same.
        late = ('--aptopt=Acquire::Check-Valid-Until "false"',)
        source = f"deb {archive()} {suite.name} main"
        options = ("--quiet", "--mode=root", "--variant=essential", "--format=directory", f"--include={include}")
        run("mmdebstrap", *options, *late, suite.name, new, source)
        new.chmod(0o755)
        new.rename(root)
    return root


def inside(root: Path, shared: dict[Path, str], script: str, *arguments: str, **environment: str) -> int:
    """Runs a shell script in a root, with folders of this machine in it and mounts that end with it."""
    # On a root that is a mount point itself, programs inside can have mounts of their own.
    mounts = [f"mount --bind {root} {root}"]
    mounts += [f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc", f"mount -t tmpfs tmp {root}/tmp"]  # noqa: S108
    for here, there in shared.items():
        (root / there.lstrip("/")).mkdir(exist_ok=True)
        mounts.append(f"mount --bind '{here}' {root}{there}")
    settings = {"PATH": "/usr/bin:/bin", "HOME": "/root", "LANG": "C.UTF-8"} | environment
    told = [f"{name}={value}" for name, value in settings.items()]
    enter = f'set -e; {"; ".join(mounts)}; exec chroot {root} env -i "$@"'
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        enter,
        "sh",
        *told,
        "sh",
        "-ec",
        script,
        "sh",
    ]
    return subprocess.run([*command, *arguments], check=False).returncode  # noqa: S603


def download(python: str, wheels: Path, names: Iterable[str]) -> bool:
    """Fetches pinned packages for a CPython that this machine need not have. Returns whether there are such wheels."""
    pinned = (ROOT / "requirements-dev.txt").read_text().splitlines()
    wanted = [line for line in pinned if line.split("==")[0] in names]
    tag = python.replace(".", "")
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (36, 28, 17)]
    abis = [f"--abi={abi}" for abi in (f"cp{tag}", "abi3", "none")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    which = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *abis, *platforms]
    return subprocess.run([*pip, *which, f"--dest={wheels}", *wanted], check=False).returncode == 0  # noqa: S603


def test(suite: Suite, python: str, wheel: Path, arguments: list[str]) -> bool:
    """Installs the wheel in a fresh environment of a CPython and runs tests. Returns whether all passed."""
    print(f"\nCPython {python} of Debian {suite.name}", flush=True)
    root = root_of(suite)
    with tempfile.TemporaryDirectory() as work:
        shared = Path(work)
        if not download(python, shared / "wheels", TESTED):
            raise SystemExit(f"no wheels of {', '.join(TESTED)} for CPython {python}")
        for name, needs in OPTIONAL.items():
            if not download(python, shared / "wheels", [name]):
                print(f"no wheel of {name} for CPython {python}, so {needs} is left out", flush=True)
                arguments = [*arguments, f"--ignore={needs}"]
        shutil.copy2(wheel, shared / "wheels")
        for name in TESTS:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, shared / name)
        script = f"""
            cd /shared
            python{python} -m venv /tmp/fresh
            /tmp/fresh/bin/pip install --quiet --disable-pip-version-check --no-index wheels/*.whl
            /tmp/fresh/bin/python -VV
            /tmp/fresh/bin/mshv-irqfd --version
            exec /tmp/fresh/bin/python -m pytest -p no:cacheprovider --quiet "$@"
        """
        told = {name: value for name, value in os.environ.items() if name.startswith("MSHV_IRQFD_")}
        return inside(root, {shared: "/shared"}, script, *arguments, **told) == 0


def pythons(chosen: list[str], arguments: list[str]) -> int:
    """Runs the tests on each CPython."""
    known = {python: suite for suite in SUITES for python in suite.pythons}
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"no CPython {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"dist/ must have one wheel, and has {len(wheels)}; run: make wheel")
    failed = [python for python in chosen or known if not test(known[python], python, wheels[0], arguments)]
    if failed:
        print(f"tests failed on CPython {', '.join(failed)}")
    return int(bool(failed))


def rust() -> int:
    """Builds the Python module with the oldest rustc that it claims to build with."""
    claimed = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["rust-version"]
    (suite,) = (suite for suite in SUITES if suite.name == RUST)
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    run("cargo", "fetch", "--locked", "--manifest-path", ROOT / "Cargo.toml")
    script = f"""
        version=$(rustc --version)
        echo "$version"
        echo "$version" | grep -qF ' {claimed}.'
        cd /source
        exec cargo build --quiet --locked --offline --lib --features python --target-dir /tmp/target
    """
    alone = {"CARGO_HOME": "/cargo", "PYO3_NO_PYTHON": "1", "PYO3_BUILD_EXTENSION_MODULE": "1"}
    status = inside(root_of(suite), {ROOT: "/source", home: "/cargo"}, script, **alone)
    print(f"rust-version {claimed}, with the rustc of Debian {RUST}: {'failed' if status else 'builds'}")
    return status


def main() -> int:
    """Runs one of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pythons", "rust"])
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, others = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if os.geteuid() != 0:
        raise SystemExit("needs root, for chroot(2) and mounts")
    return rust() if options.what == "rust" else pythons(options.versions, others or list(CHOSEN))


if __name__ == "__main__":
    sys.exit(main())
