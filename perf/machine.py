"""What was measured on: hardware, versions, revision."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from common.process import usable_cores

if (
    TYPE_CHECKING
):  # torch takes seconds to import, and a sweep asks for the card and the revision before each of its runs
    from common.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent


def hardware(ranks: Ranks) -> dict:
    """The HARDWARE of a report. cores: those that this machine gives us."""
    import torch
    from nvidia import dali

    on_gpu = ranks.device.type == "cuda"
    return {
        "device": ranks.device.type,
        "name": torch.cuda.get_device_name(ranks.device) if on_gpu else _cpu_name(),
        "ranks": ranks.world_size,
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": str(torch.__version__),
        "dali": dali.__version__,
        "driver": _driver(),
    }


def card(device: str) -> str:
    """The name of the first GPU that CUDA sees, unless --device is cpu or there is none: then the processor's."""
    if device != "cpu":
        import pynvml

        from common.nvml_devices import find_gpus

        try:
            pynvml.nvmlInit()
            gpus, _ = find_gpus(None)
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:  # no driver, or none that answers
            gpus = []
        if gpus:
            return gpus[0].name
    return _cpu_name()


def git_revision() -> str | None:
    """The commit of this repository, with "+" and a digest of the changes where tracked files differ from it.

    None where there is no repository or no git.
    """
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["diff", "HEAD", "--no-ext-diff", "--binary"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    digest = f"+{hashlib.blake2b(changes, digest_size=4).hexdigest()}" if changes else ""
    return head.decode().strip() + digest


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
