"""Memory, as a process wants it in which many threads pass buffers on for hours: glibc's heap, Python's garbage collector."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

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
