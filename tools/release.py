"""Builds the sdist and the wheel into dist/, and checks them: `make release`. Publishes nothing.

The sdist is built from a copy of the tracked files, and the wheel from the unpacked sdist. A package index shows the
README alone, so in the copy's README links to other files become absolute, below the address that --files gives.
Without one they become plain text.

The checks: the changelog has the version; the wheel is manylinux_2_17 and abi3 (auditwheel); the index would take both
files and show the README (twine); a fresh environment with nothing else installs each of them, and runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "target" / "release-files"
PLATFORM = "manylinux_2_17_x86_64"

LINK = re.compile(r"(!?)\[([^]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def standalone(readme: str, files: str | None) -> str:
    """Returns a README that can be read without the files beside it."""

    def replaced(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if files:
            return f"{picture}[{text}]({files.rstrip('/')}/{target})"
        if picture:
            return f"*(Picture: {text}.)*"
        return text if text == target else f"{text} (`{target}`)"

    return LINK.sub(replaced, readme)


def version() -> str:
    """The one place that says it: Cargo.toml."""
    return str(tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"])


def check_changelog() -> None:
    """Fails if the changelog has no section for this version."""
    if not re.search(rf"^## {re.escape(version())}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        raise SystemExit(f"CHANGELOG.md has no section '## {version()}', the version in Cargo.toml")


def run(*command: str | Path, **options: object) -> str:
    """Runs a command, and returns its standard output. Ends this program if it fails."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    }  # for `python -m ziglang`
    done = subprocess.run(  # noqa: S603 -- commands of this file
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return str(done.stdout)


def copied(files: str | None) -> Path:
    """A copy of the tracked files, with a README for the package index."""
    tree = WORK / "tree"
    for name in run("git", "-C", ROOT, "ls-files", "-z").split("\0"):
        if name and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    readme = tree / "README.md"
    readme.write_text(standalone(readme.read_text(), files))
    return tree


def build(files: str | None) -> tuple[Path, Path]:
    """Builds the sdist, and the wheel from it."""
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    tree = copied(files)
    run("maturin", "sdist", "--manifest-path", tree / "Cargo.toml", "--out", DIST)
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK / "sdist", filter="data")
    (source,) = (WORK / "sdist").iterdir()
    options = ("--release", "--locked", "--zig", "--compatibility", PLATFORM.removesuffix("_x86_64"))
    # A target directory that stays: only what has changed is built again.
    target = ("--target-dir", ROOT / "target" / "wheel")
    run("maturin", "build", "--quiet", *options, *target, "--manifest-path", source / "Cargo.toml", "--out", DIST)
    (wheel,) = DIST.glob("*.whl")
    return sdist, wheel


def check(sdist: Path, wheel: Path) -> None:
    """Fails if a file is not what it should be."""
    name = f"mshv_irqfd-{version()}"
    if sdist.name != f"{name}.tar.gz" or not wheel.name.startswith(f"{name}-cp311-abi3-"):
        raise SystemExit(f"{sdist.name} and {wheel.name} are not those of {name} for abi3 from CPython 3.11 up")
    shown = " ".join(run("auditwheel", "show", wheel).split())
    if f'is consistent with the following platform tag: "{PLATFORM}"' not in shown:
        raise SystemExit(f"the wheel is not {PLATFORM}: {shown}")
    print(run("twine", "check", "--strict", sdist, wheel).strip())


def try_out(sdist: Path, wheel: Path) -> None:
    """Installs each file in a fresh environment, and runs it there."""
    for file in (wheel, sdist):
        fresh = WORK / "fresh"
        run(sys.executable, "-m", "venv", "--clear", fresh)
        # Only building from the sdist needs anything else.
        alone = ("--no-index",) if file is wheel else ()
        run(fresh / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *alone, file)
        shown = run(fresh / "bin/mshv-irqfd", "--version", cwd=WORK).strip()
        if shown != f"mshv-irqfd {version()}":
            raise SystemExit(f"{file.name} installs {shown!r}, not version {version()}")
        run(fresh / "bin/mshv-irqfd", "demo", "--backend", "simulated", cwd=WORK)
        print(f"Runs in a fresh environment: {file.name}")


def main() -> int:
    """Builds and checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--files", metavar="URL", help="the address below which the index's readers find the README's files"
    )
    parser.add_argument("--build-only", action="store_true", help="build, and check nothing")
    options = parser.parse_args()
    if not options.build_only:
        check_changelog()
    sdist, wheel = build(options.files)
    if not options.build_only:
        check(sdist, wheel)
        try_out(sdist, wheel)
    for file in (sdist, wheel):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
