import gc
import re
import subprocess
import sys
import weakref

from common.memory import present_objects_frozen

_HEAPS_OF_EIGHT_THREADS = """
import ctypes, threading
from common.memory import share_one_heap
if {shared}: share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ready = threading.Barrier(9)
def hold():
    libc.malloc(ctypes.c_size_t(10000)), ready.wait(), ready.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads: thread.start()
ready.wait()
libc.malloc_stats()
ready.wait()
"""


def test_threads_share_one_heap():
    """malloc_stats counts glibc's heaps: several without the call, so that the test sees the difference, and one with it."""

    def heaps(shared: bool) -> int:
        code = _HEAPS_OF_EIGHT_THREADS.format(shared=shared)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return len(re.findall(r"^Arena \d+:", run.stderr, re.MULTILINE))

    assert heaps(shared=False) > 1
    assert heaps(shared=True) == 1


def test_frozen_objects_are_collected_afterwards_and_new_ones_meanwhile():
    class Node:
        itself: object

    def cycle() -> weakref.ref:
        node = Node()
        node.itself = node
        return weakref.ref(node)

    gc.disable()  # none may be collected by chance
    try:
        node = Node()
        node.itself = node
        old = weakref.ref(node)
        with present_objects_frozen():
            del node
            new = cycle()
            gc.collect()
            assert new() is None
            assert old() is not None, "not looked at"
        gc.collect()
        assert old() is None
    finally:
        gc.enable()
