"""`mshv-irqfd completion`: scripts that each shell takes, and that know the options."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from mshv_irqfd._cli import main
from mshv_irqfd._cli.completion import SHELLS


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_names_every_command_and_parses(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("demo", "probe", "bench", "completion", "torn-pushes"):
        assert word in script
    if shutil.which(shell) is None:
        pytest.skip(f"parsing the script needs {shell}: apt install {shell}")
    parsed = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False, timeout=60)
    assert (parsed.returncode, parsed.stderr) == (0, "")


def test_bash_completes_commands_options_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash: apt install bash")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words[:-1])} '{words[-1]}'); COMP_CWORD={len(words) - 1}"
        ask = f"{script}\n{line}; _shtab_mshv_irqfd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        shown = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, timeout=60)
        return shown.stdout.split()

    assert completed("mshv-irqfd", "pro") == ["probe"]
    assert completed("mshv-irqfd", "probe", "--torn") == ["--torn-pushes"]
    assert completed("mshv-irqfd", "probe", "--backend", "k") == ["kvm"]
