"""Waiting for a storage that fails: a disk that comes back, a server that is started again."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from common.errors import DataSourceError
from common.progress import say

# How long a storage that fails is tried again: while a run goes on, and while it begins, when a person waits for it.
PATIENCE_SECONDS = 60.0
PATIENCE_TO_OPEN_SECONDS = 20.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
_SECONDS_BETWEEN_WARNINGS = 10.0

T = TypeVar("T")


class StorageTrouble(Exception):
    """Something cannot be read, for the cause that this holds in words."""

    def __init__(self, cause: str, *, may_pass: bool) -> None:
        super().__init__(cause)
        self.may_pass = may_pass
        """Whether it is worth while to try again."""


def patiently(path: str, seconds: float, attempt: Callable[[], T]) -> T:
    """What an attempt to read gives; while it fails for trouble that may pass, it is made again, for so many seconds.

    Raises StorageTrouble.
    """
    deadline, pause = 0.0, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return attempt()
        except StorageTrouble as trouble:
            now = time.monotonic()
            deadline = deadline or now + seconds
            if not trouble.may_pass or now >= deadline:
                raise
            _warn_of_waiting(f"warning: {path}: cannot be read ({trouble}); trying again for up to {seconds:.0f} s")
        time.sleep(min(pause, max(0.0, deadline - now)))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def unreadable(path: str, cause: StorageTrouble) -> DataSourceError:
    """The error with which a run ends that cannot read what it needs."""
    return DataSourceError(f"{path}: cannot be read ({cause}); once it can, start the same command again")


_warning_lock = threading.Lock()
_warned_at = -_SECONDS_BETWEEN_WARNINGS


def _warn_of_waiting(warning: str) -> None:
    """Say it, unless it has just been said of another file: all the threads wait for the same thing."""
    global _warned_at
    with _warning_lock:
        if time.monotonic() - _warned_at < _SECONDS_BETWEEN_WARNINGS:
            return
        _warned_at = time.monotonic()
    say(warning)
