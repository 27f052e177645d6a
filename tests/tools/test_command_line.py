"""The command line: what every subcommand does when it is called wrongly, and when its output can't be written."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest
from mshv_irqfd._cli import UNREAD, demo, main
from mshv_irqfd._cli.progress import INTERRUPTED
from mshv_irqfd.testing import patience

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "doctor": ["doctor", "--backend", "simulated"],
    "doctor --json": ["doctor", "--backend", "simulated", "--json"],
    "demo": ["demo", "--backend", "simulated"],
    "completion": ["completion", "bash"],
}


def run(words: list[str], stdout: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mshv_irqfd._cli", *words]
    # argparse ignores a write of its own that fails, so the buffer has to take it.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.run(command, stdout=stdout, stderr=pipe, timeout=patience(), check=False, env=buffered)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_where_nobody_reads_the_output_it_ends_in_silence(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ended = run(words, write)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (UNREAD, b"")


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_where_the_disk_is_full_it_says_so(words: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        ended = run(words, full)
    finally:
        os.close(full)
    assert ended.returncode == 1
    assert ended.stderr == b"mshv-irqfd: the output can't be written: No space left on device\n"


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_without_descriptors_to_write_to_it_does_its_work(words: list[str]) -> None:
    closed = ["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, "-m", "mshv_irqfd._cli", *words]
    assert subprocess.run(closed, timeout=patience(), check=False).returncode == 0


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(command in shown.err for command in ("doctor", "demo", "probe", "bench", "completion"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["xen"], "invalid choice: 'xen'"),
        (["doctor", "--backend", "xen"], "invalid choice: 'xen'"),
        (["completion"], "the following arguments are required: shell"),
        (["probe"], "the following arguments are required: --backend"),
        (["probe", "--backend", "kvm", "--torn-pushes", "nan"], "'nan' is not a number of seconds from 0 to 86400"),
        (["probe", "--backend", "kvm", "--torn-pushes", "-1"], "'-1' is not a number of seconds"),
        (["bench", "--seconds", "x"], "'x' is not a number of seconds"),
        (["bench", "--routes", "0"], "'0': a number of routes is 1 to 4056"),
        (["bench", "plot"], "the following arguments are required: FILE, RUN.json"),
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_device_that_is_none_sends_the_user_to_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--backend", "kvm", "--device", "/dev/none"]) == 2
    error = capsys.readouterr().err
    assert "no partition of kvm: /dev/none: " in error
    assert "`mshv-irqfd doctor` tells what to do" in error
    assert main(["probe", "--backend", "kvm", "--interrupts", "/dev/hvstub"]) == 2
    assert "--interrupts /dev/hvstub goes with --backend mshv" in capsys.readouterr().err


@pytest.mark.skipif(os.path.exists("/dev/mshv"), reason="this machine has mshv")  # noqa: PTH110 - short
def test_a_demo_without_its_backend_complains_where_errors_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--backend", "mshv"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("no partition: /dev/mshv: ")


def test_ctrl_c_ends_every_command_with_its_exit_status_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_backend: str) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "open_partition", interrupted)
    assert main(["demo", "--backend", "simulated"]) == INTERRUPTED
    assert capsys.readouterr().err == ""


def test_a_file_of_results_that_is_none_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    for text, message in (
        (None, f"{file}: No such file or directory"),
        ("no", f"{file} is not JSON: "),
        ("[]", f"{file} is not a result of this version's bench"),
        ('{"format": 1}', f"{file} is not a result of this version's bench"),
    ):
        if text is not None:
            file.write_text(text)
        assert main(["bench", "compare", str(file), str(file)]) == 2
        assert capsys.readouterr().err.startswith(f"mshv-irqfd bench: {message}")


def test_a_file_that_can_not_be_written_is_refused_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["bench", "--quick", "--backend", "null", "--json"]
    assert main([*quick, str(tmp_path)]) == 2
    assert f"{tmp_path} is a directory" in capsys.readouterr().err
    # For root every file may be written.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main([*quick, str(tmp_path / "run.json")]) == 2
    assert f"{tmp_path / 'run.json'}: no permission to write it" in capsys.readouterr().err
