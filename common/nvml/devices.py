"""Which GPUs of this machine are meant: by CUDA_VISIBLE_DEVICES or by UUID, as handles of NVML.

NVML must have been initialised. It counts GPUs in the order of their PCI addresses, CUDA by speed unless
CUDA_DEVICE_ORDER=PCI_BUS_ID; of like GPUs both count alike. The rules for CUDA_VISIBLE_DEVICES are those of the CUDA C++
Programming Guide (Environment Variables) and of NVIDIA's MIG User Guide (CUDA Device Enumeration).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pynvml


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or one MIG device of a GPU: what CUDA calls a device."""

    index: int
    """NVML's and nvidia-smi's number of the whole GPU."""
    uuid: str
    """ "GPU-…", or "MIG-…"."""
    name: str
    handle: Any
    """Of the MIG device, if it is one."""
    whole: Any
    """Of the whole GPU: the same as handle without MIG."""
    whole_uuid: str
    is_mig: bool = False
    path: str = ""
    """ "MIG-<UUID of the GPU>/<GPU instance>/<compute instance>": what drivers before 470 call the MIG device."""


def find_gpus(uuids: Sequence[str] | None) -> tuple[list[Gpu], list[str]]:
    """The GPUs to sample, and what a person should know about the choice, in sentences without a full stop.

    uuids: "GPU-…", "MIG-…" or without the prefix, as torch gives them; None: those that CUDA_VISIBLE_DEVICES shows to CUDA.
    Raises pynvml.NVMLError.
    """
    cards, remarks = _cards()
    visible, more = _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), cards)
    if uuids is None:
        return visible, remarks + more
    known = [*visible, *(gpu for card in cards for gpu in card)]
    found = []
    for uuid in uuids:
        own = (gpu for gpu in known if _bare(gpu.uuid) == _bare(uuid))
        # Of a GPU in MIG mode torch may give the whole GPU's UUID: then it is the MIG device that CUDA sees.
        parts = (gpu for gpu in known if _bare(gpu.whole_uuid) == _bare(uuid))
        gpu = next(chain(own, parts), None)
        if gpu is None:
            remarks.append(f"no GPU here has the UUID {uuid}")
        else:
            found.append(gpu)
    return found, remarks


def _bare(uuid: str) -> str:
    return uuid.removeprefix("MIG-").removeprefix("GPU-")


def _visible(wanted: str | None, cards: list[list[Gpu]]) -> tuple[list[Gpu], list[str]]:
    """The GPUs that CUDA sees, in its order, given the value of CUDA_VISIBLE_DEVICES (None: it is not set), and remarks."""
    if wanted is None:
        return [card[0] for card in cards], []
    found: list[Gpu] = []
    remarks: list[str] = []
    entries = [entry.strip() for entry in wanted.split(",")]
    for entry in entries:
        # Numbers, UUIDs of GPUs and of MIG devices do not mix: the first entry says which they are.
        gpu = _named(entry, cards) if _prefix(entry) == _prefix(entries[0]) else None
        if gpu is None:
            if entry not in ("", "-1"):  # the two usual ways to say "no more"
                remarks.append(f"CUDA_VISIBLE_DEVICES: {entry!r} means no GPU here, and CUDA ignores what follows it")
            break
        if gpu in found:
            return [], [f"CUDA_VISIBLE_DEVICES={wanted} names a GPU twice, and CUDA then sees none"]
        found.append(gpu)
    by_number = not _prefix(entries[0])
    unlike = len({card[0].name for card in cards}) > 1
    if found and by_number and unlike and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        remarks.append("the GPUs here are unlike: with CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA's numbers are surely NVML's")
    return found, remarks


def _named(entry: str, cards: list[list[Gpu]]) -> Gpu | None:
    """The GPU that one entry of CUDA_VISIBLE_DEVICES means. UUIDs may be cut short; "1x" is 1, as C reads numbers.

    The number or UUID of a GPU in MIG mode means its first MIG device.
    """
    matches: list[Gpu] = []
    if _prefix(entry) == "MIG-":
        matches = [gpu for card in cards for gpu in card if gpu.uuid.startswith(entry) or gpu.path == entry]
    elif _prefix(entry) == "GPU-":
        matches = [card[0] for card in cards if card[0].whole_uuid.startswith(entry)]
    elif number := re.match(r"\d+", entry):
        matches = [card[0] for card in cards[int(number[0]) :][:1]]
    return matches[0] if len(matches) == 1 else None


def _prefix(entry: str) -> str:
    return entry[:4] if entry.startswith(("GPU-", "MIG-")) else ""


def _cards() -> tuple[list[list[Gpu]], list[str]]:
    """The MIG devices of each GPU that we may use, or the GPU alone if it has none; remarks about those that fail."""
    cards, remarks = [], []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            cards.append(_card(index))
        except pynvml.NVMLError_NoPermission:
            pass  # another job's: NVML counts it, CUDA does not
        except pynvml.NVMLError as error:
            remarks.append(f"GPU {index}: {error}")
    return cards, remarks


def _card(index: int) -> list[Gpu]:
    whole = pynvml.nvmlDeviceGetHandleByIndex(index)
    uuid = pynvml.nvmlDeviceGetUUID(whole)
    parts = [
        Gpu(
            index=index,
            uuid=pynvml.nvmlDeviceGetUUID(part),
            name=pynvml.nvmlDeviceGetName(part),
            handle=part,
            whole=whole,
            whole_uuid=uuid,
            is_mig=True,
            path=f"MIG-{uuid}/{pynvml.nvmlDeviceGetGpuInstanceId(part)}/{pynvml.nvmlDeviceGetComputeInstanceId(part)}",
        )
        for part in _mig_handles(whole)
    ]
    name = pynvml.nvmlDeviceGetName(whole)
    return parts or [Gpu(index=index, uuid=uuid, name=name, handle=whole, whole=whole, whole_uuid=uuid)]


def _mig_handles(whole: Any) -> list[Any]:
    try:
        enabled, _ = pynvml.nvmlDeviceGetMigMode(whole)
        places = pynvml.nvmlDeviceGetMaxMigDeviceCount(whole) if enabled else 0
    except (pynvml.NVMLError, AttributeError):  # a GPU, a driver or a binding that knows no MIG
        return []
    handles = []
    for place in range(places):
        try:
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, place))
        except pynvml.NVMLError_NotFound:
            continue  # an empty place
    return handles
