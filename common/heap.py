"""glibc's heap, as a process with many threads that pass buffers on wants it."""

import ctypes

_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Have all threads allocate from one heap. To be called before there are threads; does nothing without glibc.

    By default glibc gives threads up to eight heaps a core, and memory that was freed in one is of no use to a thread of
    another: with the decoder's threads, a process holds half as much again. docs/reliability.md has the figures.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_ARENA_MAX, 1)
