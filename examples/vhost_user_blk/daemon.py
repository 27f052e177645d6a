"""qemu-storage-daemon as a vhost-user block device (Debian: qemu-system-common)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

PROGRAM = "qemu-storage-daemon"


class StorageDaemon:
    """A process that serves a disk image on a Unix socket.

    The socket outlives the process: a connection waits there until the next process accepts it.

    Args:
        image: the disk image, a raw file of whole sectors.
        path: where to make the socket.

    Raises:
        FileNotFoundError: the program is not installed.
    """

    def __init__(self, image: Path, path: Path) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise FileNotFoundError(f"{PROGRAM} is not installed (Debian: apt install qemu-system-common)")
        self.image, self.path = image, path
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(os.fspath(path))
        self._socket.listen()

    def start(self, *, requests_per_second: int | None = None) -> None:
        """Starts the process.

        Args:
            requests_per_second: slows the disk down.
        """
        blockdevs = ["--blockdev", f"driver=file,node-name=image,filename={self.image}"]
        node = "image"
        if requests_per_second is not None:
            node = "slow"
            blockdevs += ["--object", f"throttle-group,id=limit,x-iops-total={requests_per_second}"]
            blockdevs += ["--blockdev", "driver=throttle,node-name=slow,throttle-group=limit,file=image"]
        address = f"addr.type=fd,addr.str={self._socket.fileno()}"
        export = f"type=vhost-user-blk,id=disk,node-name={node},writable=on,logical-block-size=512,{address}"
        self._process = subprocess.Popen(  # noqa: S603 -- the program's own options
            [self._program, *blockdevs, "--export", export],
            stdin=subprocess.DEVNULL,
            pass_fds=[self._socket.fileno()],
        )

    @property
    def pid(self) -> int | None:
        """The process's id, if there is one."""
        return self._process.pid if self._process else None

    def kill(self) -> None:
        """Ends the process at once (SIGKILL), whatever it is doing. Returns when it has gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Ends the process, and removes the socket."""
        self.kill()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
