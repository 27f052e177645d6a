"""The interpreter ends while partitions, routes and threads that use them are alive."""

from __future__ import annotations

import errno
import re
import signal
from typing import TYPE_CHECKING

import pytest
from support import run_python

if TYPE_CHECKING:
    from backends import Backend


def harm(stderr: str) -> list[str]:
    """The lines of stderr that show a crash or an error at exit."""
    return re.findall(r"^.*(?:panicked|Fatal|fatal|abort|Exception ignored|Traceback).*$", stderr, re.MULTILINE)


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_the_interpreter_ends_cleanly_with_routes_alive(backend: Backend, closed: bool) -> None:
    code = f"""
from mshv_irqfd import *
partition = open_partition({backend.name!r})
routes = [partition.new_irqfd_route() for _ in range(10)]
for route in routes:
    route.set_msi(MsiRoute.fixed(0x41, 0))
batch, event, own = partition.batch(), routes[0].event, EventFd()
ring = [partition, routes]
ring.append(ring)
del route
class Late:
    def __init__(self): self.routes = routes
    def __del__(self): [route.signal() for route in self.routes if not route.closed]
late = Late()
if {closed}:
    partition.close()
    own.close()
"""
    ended = run_python(code, "-X", "dev")
    assert (ended.returncode, harm(ended.stderr)) == (0, [])
    assert ("ResourceWarning: unclosed <" in ended.stderr) == (not closed)


@pytest.mark.parametrize("logs", [False, True], ids=["", "logging"])
def test_the_interpreter_ends_cleanly_with_routes_that_outlive_the_modules(backend: Backend, logs: bool) -> None:
    code = f"""
import logging, sys
from mshv_irqfd import MsiRoute, open_partition
if {logs}:
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
# Keeps this module's names until the other modules have lost theirs.
sys.unraisablehook = lambda it: None
partition = open_partition({backend.name!r})
routes = [partition.new_irqfd_route() for _ in range(2)]
routes[0].set_msi(MsiRoute.fixed(0x41, 0))
"""
    ended = run_python(code, "-X", "dev")
    assert (ended.returncode, ended.stderr) == (0, "")


WORK = {
    "a push": "routes[0].set_msi(MsiRoute.fixed(0x41 + turn % 2, 0))",
    "a batch": "commit(turn)",
    "arming": "routes[0].mask() if turn % 2 else routes[0].unmask()",
    "signal": "routes[1].signal()",
    "making a route": "partition.new_irqfd_route().close()",
    "opening": "open_partition(partition.backend).close()",
    "waiting": "partition.take_interrupts(3600.0)",
}

WITH_A_DAEMON = """
import itertools, os, threading, time
from mshv_irqfd import MsiRoute, open_partition

partition, theirs = open_partition({name!r}), os.eventfd(0)
routes = [partition.new_irqfd_route(), partition.new_irqfd_route(event=theirs)]
routes += [partition.new_irqfd_route() for _ in range(50)]
for route in routes[:2]:
    route.set_msi(MsiRoute.fixed(0x41, 0))

def commit(turn):
    with partition.batch() as batch:
        for route in routes:
            batch.set_msi(route, MsiRoute.fixed(0x42 + turn % 2, 0))

began = threading.Event()

def work():
    for turn in itertools.count():
        if turn == {turns}:
            began.set()
        {work}

class Last:
    # Finalized when no other thread may return to Python. Waits until the daemon has tried to: it has ended, or waits
    # for ever.
    def __del__(self, open=open, sleep=time.sleep):
        while True:
            try:
                with open(self.doing) as doing:
                    call, *arguments = doing.read().split()
            except OSError:
                return
            if call == "34" or (call == "202" and arguments[3] == "0x0"):  # pause(2), futex(2) without a timeout
                return
            sleep(0.0005)

daemon = threading.Thread(target=work, daemon=True)
daemon.start()
began.wait()
last = Last()
last.doing = f"/proc/self/task/{{daemon.native_id}}/syscall"
"""


@pytest.mark.parametrize("work", WORK)
def test_the_interpreter_ends_while_a_daemon_thread_is_in_a_call(backend: Backend, work: str) -> None:
    waiting = work == "waiting"
    if waiting and backend.name == "mshv":
        pytest.skip("mshv does not report interrupts, so nothing waits for them")
    code = WITH_A_DAEMON.format(name=backend.name, work=WORK[work], turns=0 if waiting else 3)
    ended = run_python(code, "-W", "ignore")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_exiting_the_interpreter_inside_with_closes_and_prints_nothing(backend: Backend) -> None:
    code = f"""
import sys
from mshv_irqfd import MsiRoute, open_partition
with open_partition({backend.name!r}) as partition, partition.new_irqfd_route() as route, partition.batch() as batch:
    route.set_msi(MsiRoute.fixed(0x41, 0))
    batch.mask(route)
    sys.exit(3)
"""
    ended = run_python(code, "-X", "dev")
    assert (ended.returncode, ended.stderr) == (3, "")


@pytest.mark.parametrize("inside", ["with", "globals"])
def test_ctrl_c_during_a_wait_ends_the_interpreter(backend: Backend, inside: str) -> None:
    if backend.name == "mshv":
        pytest.skip("mshv does not report interrupts, so nothing waits for them")
    code = f"""
import os, signal, threading
from contextlib import ExitStack, nullcontext
from mshv_irqfd import MsiRoute, open_partition
waits = threading.Event()
def press():
    waits.wait()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
partition = open_partition({backend.name!r})
with partition if {inside == "with"} else nullcontext():
    route = partition.new_irqfd_route()
    route.set_msi(MsiRoute.fixed(0x41, 0))
    waits.set()
    partition.take_interrupts(3600.0)
"""
    ended = run_python(code, "-X", "dev")
    assert ended.returncode == -signal.SIGINT
    assert len(harm(ended.stderr)) == 1
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt") or inside == "globals"
    assert ("unclosed" in ended.stderr) == (inside == "globals")


def test_a_finalizer_that_runs_while_the_interpreter_ends_gets_the_packages_errors(backend: Backend) -> None:
    code = f"""
import os
from mshv_irqfd import open_partition
class Late:
    def __del__(self, write=os.write):
        def tell(use):
            try:
                use()
            except BaseException as error:
                write(1, f"{{type(error).__name__}} ".encode())
        tell(lambda: self.partition.new_irqfd_route(event=self.closed))
        tell(lambda: self.route.set_msi(0xFEE09000, 0x41))
        self.partition.close()
        tell(self.route.mask)
late = Late()
late.partition = open_partition({backend.name!r})
late.route, late.closed = late.partition.new_irqfd_route(), os.eventfd(0)
os.close(late.closed)
"""
    ended = run_python(code)
    assert (ended.returncode, ended.stdout) == (0, "IrqFdError MissingVpError ClosedError ")
    assert harm(ended.stderr) == []


@pytest.mark.parametrize("reused", [False, True], ids=["free", "reused"])
@pytest.mark.parametrize("how", ["del", "end"])
def test_finalizing_a_partition_whose_descriptor_someone_else_closed_reports_to_the_hook_only(
    backend: Backend, how: str, reused: bool
) -> None:
    if backend.name == "simulated":
        pytest.skip("a simulated partition has no descriptor of its own to close")
    code = f"""
import os, sys
from mshv_irqfd import MsiRoute, open_partition
class Last:
    def __del__(self, write=os.write, fstat=os.fstat):
        fstat(self.taken)
        write(1, b"the reused number is open ")
last = Last()
def hook(it, write=os.write):
    write(1, f"{{it.exc_type.__name__}} {{it.exc_value.errno}} ".encode())
sys.unraisablehook = hook
partition = open_partition({backend.name!r})
routes = [partition.new_irqfd_route() for _ in range(2)]
for route in routes:
    route.set_msi(MsiRoute.fixed(0x41, 0))
last.taken = partition.fileno()
os.close(last.taken)
if {reused}:
    assert os.open("/dev/null", os.O_RDONLY) == last.taken
else:
    last.taken = 0
if {how!r} == "del":
    del route, routes, partition
"""
    ended = run_python(code, "-W", "ignore")
    assert (ended.returncode, ended.stderr) == (0, "")
    told = f"IrqFdError {errno.ENOTTY if reused else errno.EBADF} "
    assert ended.stdout.replace(told, "") == "the reused number is open "
    # At interpreter exit the hook is gone.
    assert (told in ended.stdout) == (how == "del")
