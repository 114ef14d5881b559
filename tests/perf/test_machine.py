"""Processor time is that of the cores and the control group of this process, not of a neighbour's on the same server."""

import os
from time import process_time

import pytest
import torch

from common.ranks import Ranks
from perf.machine import busy_seconds, hardware, watched

TICKS = os.sysconf("SC_CLK_TCK")
# user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice: proc(5). Core 10 is not core 1.
STAT = f"""cpu  {1111 * TICKS} 0 0 0 0 0 0 0 0 0
cpu0 {1 * TICKS} {2 * TICKS} {3 * TICKS} {900 * TICKS} {900 * TICKS} {4 * TICKS} {5 * TICKS} {6 * TICKS} {900 * TICKS} 0
cpu1 {100 * TICKS} 0 0 0 0 0 0 0 0 0
cpu10 {1000 * TICKS} 0 0 0 0 0 0 0 0 0
intr 5 6 7
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A file system in which this process may use cores 0 and 10 of a server."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 10})
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/stat").write_text(STAT)
    return tmp_path


def write_groups(root, groups: str, files: dict[str, str]) -> None:
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_only_the_cores_of_this_process_count(root):
    assert busy_seconds(root) == 21 + 1000
    assert watched(root) == {0, 10}


V2 = {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "a/b/cpu.stat": "usage_usec 3000000\n"}
V1 = {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "seconds"),
    [
        ("0::/a/b\n", {**V2, "a/cpu.stat": "usage_usec 7500000\nuser_usec 1\n"}, 7.5),  # of the group with the quota
        (
            "0::/a/b\n",
            {**V2, "a/cpu.max": "200000 100000", "a/cpu.stat": "usage_usec 7500000\n"},
            1021,
        ),  # no less than 2
        ("0::/a/b\n", {**V2, "a/cpu.stat": "nr_periods 4\n"}, 1021),  # it does not say
        ("2:cpu,cpuacct:/a\n", {**V1, "cpu,cpuacct/a/cpuacct.usage": "7500000000\n"}, 7.5),
    ],
)
def test_with_a_quota_the_programs_that_share_it_count(root, groups, files, seconds):
    write_groups(root, groups, files)
    assert busy_seconds(root) == seconds


def test_what_this_process_computes_is_in_it():
    busy, used = busy_seconds(), process_time()
    while process_time() - used < 0.3:
        pass
    assert busy_seconds() - busy > 0.25  # the system counts in ticks of 10 ms


def test_hardware_says_on_how_many_machines():
    ranks = Ranks(
        rank=0, world_size=8, local_rank=0, local_world_size=4, device=torch.device("cpu"), patient_group=None
    )
    found = hardware(ranks)
    assert (found.device, found.ranks, found.machines) == ("cpu", 8, 2)
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_gib > 0
