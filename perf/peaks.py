"""What the hardware could do at most: from a table of GPUs (cards.tsv), or measured on the spot.

The table has the vendors' figures: dense (without sparsity), at the boost clock, 16-bit products accumulated in float32, as
PyTorch has them done (on GeForce cards and the A10G that is half the rate of accumulation in float16). PCIe: 16 lanes of
generation 3, 4 or 5 at 8, 16 or 32 GT/s, 128 of 130 bits of which are data. NVLink: all links of the GPU together, in each
direction (Infinity Fabric on AMD's). What no document says is left empty.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import msgspec
import torch
import torch.nn.functional as F

from perf.report import Peaks

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MEASURE_SECONDS = 0.5
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_CONVOLUTION_IMAGES = {"cpu": 16, "cuda": 1024}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


class Card(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A GPU as its vendor describes it: a row of cards.tsv. None: it has none, or no document at hand says so."""

    name: str  # short, for --gpu
    reported_as: tuple[str, ...]  # what the driver calls it (torch.cuda.get_device_name, nvmlDeviceGetName)
    fp32_tflops: float  # without tensor cores
    tf32_tflops: float | None
    bf16_tflops: float | None
    fp16_tflops: float
    memory_gbytes_per_second: float
    pcie_gbytes_per_second: float  # in each direction
    nvlink_gbytes_per_second: float | None
    nvlink_gpus: int  # GPUs that NVLink joins: 2 or 4 by a bridge, 8 on a board, 72 in a rack
    in_switch: bool  # whether the NVLink switch between them adds up (NVLink SHARP: NVSwitch of the third generation and later)
    machine_gpus: int  # GPUs of a usual machine; of one NVLink domain, where that is larger
    watts: float | None  # power limit
    source: str

    def joined_by_nvlink(self, gpus: int) -> bool:
        """Whether NVLink joins so many GPUs of a machine; PCIe does otherwise."""
        return bool(self.nvlink_gbytes_per_second) and gpus <= self.nvlink_gpus

    def bytes_per_second_to_peers(self, gpus: int) -> float:
        """In each direction, among so many GPUs of a machine."""
        nvlink = self.nvlink_gbytes_per_second if self.joined_by_nvlink(gpus) else None
        return (nvlink or self.pcie_gbytes_per_second) * 1e9


def _read_cards() -> tuple[Card, ...]:
    with open(Path(__file__).with_name("cards.tsv"), newline="", encoding="utf-8") as file:
        rows = [{name: text or None for name, text in row.items()} for row in csv.DictReader(file, delimiter="\t")]
    return msgspec.convert(
        [{**row, "reported_as": str(row["reported_as"]).split(" | ")} for row in rows], tuple[Card, ...], strict=False
    )


CARDS = _read_cards()


def find_card(name: str) -> Card | None:
    """The card of that name, the short one or the driver's; None for one that is not in the table.

    Names must agree to the last letter, but for case, spaces and dashes: a V100S, an RTX 4090 Laptop GPU and a slice of a GPU
    (… MIG 1g.10gb) are other devices than those they are named after.
    """
    wanted = _plain(name)
    return next((card for card in CARDS if wanted in map(_plain, (card.name, *card.reported_as))), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def peaks_of(name: str, precision: str) -> Peaks | None:
    """The table's peaks for a device's name and a --precision of train.py (bf16, fp16 or fp32); None where it has none.

    fp32 is what the trainer makes of it: TF32 on GPUs that have it (engine/precision.py).
    """
    card = find_card(name)
    if card is None:
        return None
    rates = {"bf16": card.bf16_tflops, "fp16": card.fp16_tflops, "fp32": card.tf32_tflops or card.fp32_tflops}
    if (tflops := rates[precision]) is None:
        return None
    return Peaks(
        name=card.name,
        source="table",
        flops_per_second=tflops * 1e12,
        bytes_per_second=card.memory_gbytes_per_second * 1e9,
        watts=card.watts,
    )


def measure_peaks(device: torch.device, precision: str) -> Peaks:
    """What this device reaches here and now, in all threads and with the numerics that are set: about 3 s.

    FLOP/s: the best of many large matrix products and large convolutions; libraries for CPUs can be twice as fast at one as
    at the other. Bytes/s: the best of many copies, of reading alone, and of updating in place, all much larger than any cache.
    """
    dtype, kind = _DTYPES[precision], device.type
    with torch.no_grad():
        flops_per_second = max(_best_rate(*make(dtype, device), device) for make in (_matrix_product, _convolution))
        bytes_per_second = max(_best_rate(*traffic, device) for traffic in _memory_traffic(device))
    name = torch.cuda.get_device_name(device) if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Peaks(
        name=name, source="measured", flops_per_second=flops_per_second, bytes_per_second=bytes_per_second, watts=None
    )


def peaks_here(device: torch.device, precision: str) -> Peaks:
    """Of this machine's device: from the table where it is there, measured otherwise."""
    found = peaks_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return found or measure_peaks(device, precision)


# ---- measuring: each a function to call, and the FLOPs or bytes of a call ------------------------------------------


def _matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float]:
    side = _MATRIX_SIDE[device.type]
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(one)
    return lambda: torch.mm(one, other, out=result), 2.0 * side**3


def _convolution(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float]:
    """As in the network's last block: 512 channels to 512, 3×3, 14×14 pixels, channels_last."""
    shape, images = (512, 512, 3, 3), _CONVOLUTION_IMAGES[device.type]
    weight = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(images, 512, 14, 14, device=device).to(dtype, memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1), 2.0 * x.numel() * weight[0].numel()


def _memory_traffic(device: torch.device) -> list[tuple[Callable[[], object], float]]:
    size = _COPY_BYTES[device.type]
    # ones, not zeros: the kernel maps memory that was never written to one and the same page
    one, other = (torch.ones(size // 4, device=device) for _ in range(2))
    return [(lambda: other.copy_(one), 2 * size), (lambda: one.sum(), size), (lambda: other.add_(one), 3 * size)]


def _best_rate(call: Callable[[], object], work: float, device: torch.device) -> float:
    call()
    fastest, began = _seconds(call, device), perf_counter()
    while perf_counter() - began < _MEASURE_SECONDS:
        fastest = min(fastest, _seconds(call, device))
    return work / fastest


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        began = perf_counter()
        call()
        return perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
