"""The least time of a step's parts.

Each pass of a layer takes as long as its FLOPs at the peak rate or its bytes at the memory's, whichever is longer; the
optimizer takes its bytes. Layers follow one another, so that their times add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from perf.costs import LayerCost, Work, layer_costs, optimizer_bytes
from perf.peaks import Peaks
from perf.scaling import ComputeTimes, LayerBackward


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one GPU trains, in the words of train.py's flags."""

    arch: str
    classes: int
    crop: int
    batch: int
    """Images of this GPU in one step."""
    micro_batch: int | None = None
    """Images in one pass, a divisor of `batch`; None: all."""
    precision: str
    """bf16, fp16 or fp32."""
    grad_compression: str = "none"
    """none, bf16 or fp16."""
    ranks: int = 1
    """GPUs that train together."""

    @property
    def passes(self) -> int:
        return self.batch // (self.micro_batch or self.batch)

    def layers(self) -> list[LayerCost]:
        """Costs of one pass, forward and backward. Raises ValueError as VGG does."""
        return layer_costs(
            self.arch,
            classes=self.classes,
            crop=self.crop,
            batch=self.batch // self.passes,
            bytes_per_value=4 if self.precision == "fp32" else 2,
        )


def floor_times(job: Job, layers: Sequence[LayerCost], peaks: Peaks) -> ComputeTimes:
    """Of a step of one GPU, less the all-reduce."""
    parameters = sum(sum(layer.parameters) for layer in layers)
    return ComputeTimes(
        batch=job.batch,
        passes=job.passes,
        forward_seconds=sum(_seconds(layer.forward, peaks) for layer in layers),
        backward=[LayerBackward(_seconds(layer.backward, peaks), layer.parameters) for layer in reversed(layers)],
        optimizer_seconds=optimizer_bytes(parameters, job.precision) / peaks.bytes_per_second,
    )


def layer_row(layer: LayerCost, passes: int, peaks: Peaks) -> dict:
    """A layer's part of a step, forward and backward together, as plain values."""
    return {
        "name": layer.name,
        "kind": layer.kind,
        "flops": passes * (layer.forward.flops + layer.backward.flops),
        "bytes": passes * (layer.forward.bytes + layer.backward.bytes),
        "floor_seconds": passes * (_seconds(layer.forward, peaks) + _seconds(layer.backward, peaks)),
    }


def _seconds(work: Work, peaks: Peaks) -> float:
    return max(work.flops / peaks.flops_per_second, work.bytes / peaks.bytes_per_second)
