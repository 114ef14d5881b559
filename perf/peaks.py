"""What the hardware could do at most: from a table of GPUs, or measured on the spot."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F

from perf.cards import find_card

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MEASURE_SECONDS = 0.5
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_CONVOLUTION_IMAGES = {"cpu": 16, "cuda": 1024}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Of one device in one precision."""

    name: str
    source: str
    """table or measured."""
    flops_per_second: float
    """Matrix products, two FLOP a multiply-add, dense."""
    bytes_per_second: float
    """Memory, reads and writes together."""
    watts: float | None
    """Power limit; None where it was measured."""


def peaks_of(name: str, precision: str) -> Peaks | None:
    """The table's peaks for a device's name and a --precision of train.py (bf16, fp16 or fp32); None where it has none.

    fp32 is what the trainer makes of it: TF32 on GPUs that have it (engine/precision.py).
    """
    card = find_card(name)
    if card is None:
        return None
    rate = {"bf16": card.bf16, "fp16": card.fp16, "fp32": card.tf32 or card.fp32}[precision]
    if rate is None:
        return None
    return Peaks(
        name=card.name,
        source="table",
        flops_per_second=rate * 1e12,
        bytes_per_second=card.memory * 1e9,
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
        name=name,
        source="measured",
        flops_per_second=flops_per_second,
        bytes_per_second=bytes_per_second,
        watts=None,
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
