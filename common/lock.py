"""What one process at a time writes to: a folder of a run, a table of a sweep.

docs/tried.md says why it is not filelock's.
"""

import contextlib
import fcntl
import math
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from common.errors import UserError
from common.files import open_own
from common.progress import say

_PATIENCE_SECONDS = 20.0  # for a run that was stopped, whose last step and checkpoint are still to come
_SILENT_SECONDS = 0.5  # to write a table takes less
_HOLDER = b"pid "  # how the file begins


class BusyError(UserError):
    """Another process has the lock."""


class FolderLock:
    """A context manager; from take() on, no other process can take the lock. The kernel releases it if this one is killed.

    The lock is on a file in the folder that stays there: to remove it would let two others lock two different files.
    """

    NAME = ".lock"

    def __init__(self, folder: Path, name: str = NAME) -> None:
        """name: of the file."""
        self._folder, self._name = folder, name
        self._descriptor: int | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # which releases the lock

    def take(self, *, patience_seconds: float | None = None, required: bool = False) -> None:
        """Lock the folder, which must exist; once is enough.

        patience_seconds: for another process that has the lock; default: 20. required: not to go on where the file system has
        no locks.
        Raises BusyError: another process still has it after that. UserError: there are no locks. OSError: the folder is
        read-only, or the lock's file is a link.
        """
        if self._descriptor is not None:
            return
        patience = _PATIENCE_SECONDS if patience_seconds is None else patience_seconds
        descriptor, began, told = open_own(self._folder / self._name, os.O_RDWR), time.monotonic(), False
        try:
            while not self._locked(descriptor, required):
                holder = f"another run ({os.pread(descriptor, 1000, 0).decode(errors='replace') or 'unknown'})"
                waited = time.monotonic() - began
                if waited > patience:
                    raise BusyError(f"{holder} is writing to {self._folder}; end it first, or choose another folder")
                if waited > _SILENT_SECONDS and not told:
                    limit = f" up to {patience:.0f} s" if math.isfinite(patience) else ""
                    say(f"waiting{limit} for {holder} to leave {self._folder}")
                    told = True
                time.sleep(0.1)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # on a full disk the lock holds, but does not say whose it is
            if os.pread(descriptor, len(_HOLDER), 0) in (b"", _HOLDER):  # else it is somebody's file of that name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _HOLDER + f"{os.getpid()}, host {socket.gethostname()}".encode(), 0)

    def _locked(self, descriptor: int, required: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if required:
                raise UserError(
                    f"{self._folder}: its file system has no locks ({error.strerror}); use another"
                ) from error
        return True
