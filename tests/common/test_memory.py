import gc
import re
import subprocess
import sys
import weakref

import pytest

from common.memory import available_bytes, present_objects_frozen

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


@pytest.mark.parametrize(
    ("groups", "limits", "available"),
    [
        ("0::/a/b\n", {}, 9000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "7"}, 9000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "5000", "a/b/memory.current": "3000", "a/b/memory.stat": ""}, 9000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "5000", "a/b/memory.current": "3000"}, 2000 + 110),
        ("0::/a/b\n", {"a/memory.max": "5000", "a/memory.current": "3000"}, 2000 + 110),
        ("0::/host/path\n", {"memory.max": "5000", "memory.current": "3000"}, 2000 + 110),
        (
            "4:memory:/a\n1:cpu:/b\n",
            {"memory/a/memory.limit_in_bytes": "5000", "memory/a/memory.usage_in_bytes": "4900"},
            100 + 1100,
        ),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, 9000 * 1024),
    ],
)
def test_available_memory_is_the_machine_s_and_what_the_control_groups_leave(tmp_path, groups, limits, available):
    """Files in memory make room."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99999 kB\nMemAvailable:    9000 kB\nHugePages_Total:  0\n")
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        if path.name != "memory.stat" and not (path.parent / "memory.stat").exists():
            of_version_1 = "total_inactive_file 1000\ntotal_active_file 100\n"
            (path.parent / "memory.stat").write_text(f"anon 5\ninactive_file 100\nactive_file 10\n{of_version_1}")
    assert available_bytes(tmp_path) == available


def test_available_memory_where_the_kernel_tells_nothing(tmp_path):
    assert available_bytes(tmp_path) == sys.maxsize
    assert 2**20 < available_bytes() < 2**50
