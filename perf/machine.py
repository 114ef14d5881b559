"""What was measured on: hardware, versions, revision."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.process import control_groups, cpu_quota, usable_cores
from perf.report import Hardware

# Torch takes seconds to import, and a sweep asks for the card and the revision before each of its runs.
if TYPE_CHECKING:
    from common.ranks import Ranks

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


def hardware(ranks: Ranks) -> Hardware:
    """Of this rank's device and machine, and how many of each there are."""
    import torch
    from nvidia import dali

    on_gpu = ranks.device.type == "cuda"
    return Hardware(
        device=ranks.device.type,
        name=torch.cuda.get_device_name(ranks.device) if on_gpu else _cpu_name(),
        ranks=ranks.world_size,
        machines=-(-ranks.world_size // ranks.local_world_size),
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        torch=str(torch.__version__),
        dali=dali.__version__,
        driver=_of_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion())),
    )


def card(device: str) -> str:
    """The name of the first GPU that CUDA sees, unless --device is cpu or there is none: then the processor's."""

    def names(nvml: Any) -> list[str]:
        from common.nvml.devices import find_gpus

        return [gpu.name for gpu in find_gpus(None)[0]]

    found = _of_nvml(names) if device != "cpu" else None
    return found[0] if found else _cpu_name()


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


def watched(root: Path = Path("/")) -> Path | frozenset[int]:
    """Whose processor time busy_seconds() counts: all programs' on the cores that this process may use, by their numbers; or
    its control group's, where a CPU quota gives it fewer cores than its affinity names. Programs outside of the group leave the
    quota alone (unless all quotas together are more than the machine has, which does not show here). root: of the file system.
    """
    cores = frozenset(os.sched_getaffinity(0))
    quotas = [(quota, folder) for folder in control_groups(root, "cpu") if (quota := cpu_quota(folder))]
    quota, group = min(quotas, default=(len(cores), root))
    return group if quota < len(cores) and _group_seconds(group) is not None else cores


def busy_seconds(root: Path = Path("/")) -> float:
    """Processor time, since some moment in the past, of all programs that take it from the cores that this process may use."""
    cores = watched(root)
    if isinstance(cores, Path):
        return _group_seconds(cores) or 0.0
    ticks = 0
    with open(root / "proc/stat") as lines:
        for name, *counts in map(str.split, lines):
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
                user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])  # proc(5)
                ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _group_seconds(folder: Path) -> float | None:
    """Processor time of a control group, version 2 or version 1; None: it does not say."""
    with suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
        return int(counts["usage_usec"]) / 1e6
    with suppress(OSError, ValueError):
        return int((folder / "cpuacct.usage").read_text()) / 1e9
    return None


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def _of_nvml(ask: Callable[[Any], T]) -> T | None:
    """What NVML answers to a question; None: no binding, no driver, an old one, no permission, all the same here."""
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        answer = ask(pynvml)
        pynvml.nvmlShutdown()
        return answer
    return None
