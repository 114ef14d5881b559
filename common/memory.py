"""Memory, as a process wants it in which many threads pass buffers on for hours: glibc's heap, Python's garbage collector; and
how much of it there is.
"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

from common.process import control_groups

_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Have all threads allocate from one heap. To be called before there are threads; does nothing without glibc.

    By default glibc gives threads up to eight heaps a core, and memory that was freed in one is of no use to a thread of
    another: with the decoder's threads, a process holds half as much again. docs/tried.md has the figures.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def present_objects_frozen() -> Iterator[None]:
    """Have the garbage collector look through new objects only.

    torch and DALI bring very many that stay. Looking through them again and again costs a loader of 5,000 images a
    second 4 to 5 µs of a core for each image (of 22; docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still get: what the machine has free or can free, and what its control groups' limits leave.

    root: of the file system.
    """
    found = [sys.maxsize]
    with contextlib.suppress(OSError, LookupError, ValueError):
        found.append(1024 * _numbers(root / "proc/meminfo")["MemAvailable:"])
    for folder in control_groups(root, "memory"):
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with contextlib.suppress(OSError, LookupError, ValueError):  # no such group, or no limit: "max"
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                counted = _numbers(folder / "memory.stat")
                # Files in memory count as used, and make room where it is needed.
                found.append(left + counted[f"{prefix}inactive_file"] + counted[f"{prefix}active_file"])
    return min(found)


def _numbers(path: Path) -> dict[str, int]:
    """Of a file of the kernel's with a name and a number in each line."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}
