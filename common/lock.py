"""A folder that one run at a time writes to."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from common.errors import UserError
from common.files import open_own
from common.progress import say

_PATIENCE_SECONDS = 20.0  # for a run that was stopped, whose last step and checkpoint are still to come
_HOLDER = b"pid "  # how the file begins


class FolderLock:
    """A context manager; from take() on, no other process can take the lock. The kernel releases it if this one is killed.

    The lock is on a file in the folder that stays there: to remove it would let two others lock two different files.
    """

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # which releases the lock

    def take(self) -> None:
        """Lock the folder, which must exist; once is enough. Where the file system has no locks, go on without.

        Raises UserError: another process has it, and still has it after some patience. OSError: the folder is read-only, or
        the lock's file is a link.
        """
        if self._descriptor is not None:
            return
        descriptor = open_own(self._folder / self.NAME, os.O_RDWR)
        deadline = None
        while not _lock(descriptor):
            holder = f"another run ({os.pread(descriptor, 1000, 0).decode(errors='replace') or 'unknown'})"
            if deadline is None:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                say(f"waiting up to {_PATIENCE_SECONDS:.0f} s for {holder} to leave {self._folder}")
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(f"{holder} is writing to {self._folder}; end it first, or choose another folder")
            time.sleep(0.1)
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # on a full disk the lock holds, but does not say whose it is
            if os.pread(descriptor, len(_HOLDER), 0) in (b"", _HOLDER):  # else it is somebody's file of that name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _HOLDER + f"{os.getpid()}, host {socket.gethostname()}".encode(), 0)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks on this file system
    return True
