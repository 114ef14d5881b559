"""What was measured on: hardware, versions, revision."""

import os
import subprocess
from pathlib import Path

import torch
from nvidia import dali

from common.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent


def hardware(ranks: Ranks) -> dict:
    """The HARDWARE of a report. cores: those that this machine gives us."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "device": ranks.device.type,
        "name": torch.cuda.get_device_name(ranks.device) if on_gpu else _cpu_name(),
        "ranks": ranks.world_size,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": str(torch.__version__),
        "dali": dali.__version__,
        "driver": _driver(),
    }


def git_revision() -> str | None:
    """The commit of this repository, with a + where files differ from it; None where there is no repository or no git."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changes)


def busy_seconds() -> float:
    """Processor time of all programs of this machine since it started, and of the system."""
    with open("/proc/stat") as lines:
        user, nice, system, _, _, irq, softirq, steal = map(int, next(lines).split()[1:9])  # proc(5)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    except Exception:  # no driver, an old one, no permission: all the same here
        return None
    return version
