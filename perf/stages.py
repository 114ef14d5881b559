"""The stages of a profile, each measured with the trainer's own objects.

What feeds a stage begins with it, so that nothing lies ready at first; and its first steps are not counted, as many as may lie
ready later. With --order window, a window of shards is read while the one before it is used up, and comes at once: whole
windows are counted, from the middle of one to the middle of another.
"""

import bisect
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.ranks import Ranks
from engine.assembly import Assembly, assemble, network_of
from engine.config import Config
from engine.data import Data, open_data
from engine.precision import Precision, choose_precision, set_numerics
from engine.step import TrainStep
from model.vgg import VGG
from perf.laps import Laps, MarkedBatches, MarkedPrecision
from perf.loader_parts import decoding_alone, reading_alone
from perf.timing import SETTLING_STEPS, Limits, Timing, measure
from pipeline.loader import Batch, SyntheticLoader
from pipeline.tables import ShardTable

_STAGES_WITH_DATA = 4
_READING, _DECODING, _LOADER, _TRAINING = range(_STAGES_WITH_DATA)
_FEW_WINDOWS = 10  # of an epoch
_HOST_STEPS = 5
_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A configuration on its ranks, with its data set open, and how its steps are timed."""

    config: Config
    ranks: Ranks
    precision: Precision
    data: Data
    laps: Laps
    """By the device's clock."""
    limits: Limits

    @property
    def share(self) -> int:
        """Images of each rank in a step."""
        return self.config.batch_size // self.ranks.world_size

    @property
    def passes(self) -> int:
        """Micro-batches of each rank in a step."""
        return self.share // self.data.micro_batch

    @property
    def has_images(self) -> bool:
        """False for synthetic data."""
        return self.data.manifest is not None

    def time(
        self, step: Callable[[], object], *, laps: Laps | None = None, queue: int = 0, feed: "Feed | None" = None
    ) -> Timing:
        """Every rank must call this; the steps may wait for each other. queue: as for measure(), if there is no feed."""
        limits, period = self.limits, 1
        if feed:
            queue, period = feed.queue, feed.period
            limits = replace(limits, least_laps=math.ceil(limits.least_laps / feed.windows))
        return measure(step, laps=laps or self.laps, ranks=self.ranks, limits=limits, queue=queue, period=period)


@dataclass(frozen=True, kw_only=True)
class Feed:
    """How a loader feeds a stage."""

    start: int
    """The first sample."""
    queue: int
    """Steps that may lie ready; with windows, steps until the middle of the second."""
    period: int = 1
    """Steps after which a window of shards ends at the same place of a step again; 1 where each batch is read by itself."""
    windows: int = 1
    """In a period."""


def feed_of(bench: Bench, stage: int) -> Feed:
    """Of one of the stages with data.

    Each begins elsewhere in the epoch, so that of a data set that is larger than the memory none finds in the page cache what
    the one before it has read; with windows of shards, one step before a window's end.
    """
    gc.collect()  # ends the loader of an earlier stage, which is in cycles of references and would read on
    data, config = bench.data, bench.config
    plan, images, batch = data.train_plan(), data.train_images, config.batch_size
    queue = math.ceil(config.prefetch / bench.passes)
    read_ahead = math.ceil(config.read_ahead / bench.passes) if isinstance(plan.table, ShardTable) else 0
    if (group := plan.read_group) is None:
        return Feed(start=stage * images // _STAGES_WITH_DATA, queue=queue + read_ahead)

    def window(number: int) -> int:
        return group(plan.samples(np.array([number])))

    def begin(window_number: int) -> int:
        return bisect.bisect_left(range(2 * images), window_number, key=window)

    windows = window(images) - window(0)  # of an epoch
    size = begin(windows - 1) / (windows - 1) if windows > 1 else images  # of all but the last, on average
    if windows < _FEW_WINDOWS and abs(images - begin(windows - 1) - size) > 0.05 * size:
        number, period = windows, round(images / batch)  # the last window is another one: whole epochs are alike
    else:
        near = max(0.1, size / batch / 50)  # so little of a window that many periods later it still is the middle
        fits = (count for count in range(1, 9) if abs(count * size / batch - round(count * size / batch)) <= near)
        number = next(fits, 1)
        period = max(1, round(number * size / batch))
    # Three windows and more lie between the first one and the epoch's last, where there are that many.
    first = stage * (windows - 6 if windows >= _FEW_WINDOWS else windows) // _STAGES_WITH_DATA
    to_the_middle = 1 + round(size / batch / 2) - (SETTLING_STEPS + 1)  # which measure() adds
    if size < read_ahead * batch:  # windows so small that several are under way at a time
        to_the_middle += read_ahead
    return Feed(start=max(0, begin(first + 1) - batch), queue=max(queue, to_the_middle), period=period, windows=number)


def open_bench(config: Config, ranks: Ranks, limits: Limits) -> Bench:
    """Raises UserError as open_data does.

    The learning rate is 0: the weights stay as they are at first, so that no figure depends on what was measured before it.
    """
    set_numerics(deterministic=config.deterministic)
    laps = Laps(ranks.device)
    plain = choose_precision(config.precision, ranks.device)
    precision = MarkedPrecision(plain.name, plain.device_type, laps)
    config = replace(config, lr=0.0)
    data = open_data(config, ranks, precision)
    return Bench(config=config, ranks=ranks, precision=precision, data=data, laps=laps, limits=limits)


def time_reading(bench: Bench) -> Timing:
    """Nothing but reading what a step needs. Not for synthetic data."""
    feed = feed_of(bench, _READING)
    read = _times(bench.passes, reading_alone(bench.data, feed.start))
    return bench.time(read, laps=Laps(torch.device("cpu")), feed=feed)


def time_decoding(bench: Bench) -> Timing:
    """Nothing but decoding what a step needs. Not for synthetic data. Raises UserError: an image cannot be decoded."""
    decode = decoding_alone(bench.data, feed_of(bench, _DECODING).start)
    return bench.time(_times(bench.passes, decode), queue=bench.config.prefetch)


def time_loader(bench: Bench) -> tuple[Timing, float]:
    """The loader, of which nobody uses the images; and the seconds until it had the first of them."""
    feed, began = feed_of(bench, _LOADER), perf_counter()
    batches = bench.data.train_batches(feed.start)
    next(batches)
    first_batch_seconds = perf_counter() - began
    load = _times(bench.passes, lambda: next(batches))
    return bench.time(load, feed=feed), first_batch_seconds


def build_model(bench: Bench) -> VGG:
    config = bench.config
    return network_of(config, classes=len(bench.data.classes), device=bench.ranks.device)


def assemble_step(bench: Bench, model: VGG) -> tuple[Assembly, float]:
    """The training step, compiled where that is asked for; and the seconds of its first pass, with the compilation."""
    assembly = assemble(
        bench.config,
        ranks=bench.ranks,
        precision=bench.precision,
        micro_batch=bench.data.micro_batch,
        model=model,
    )
    return assembly, _first_pass(bench, assembly)


def time_step_without_all_reduce(bench: Bench, model: VGG) -> Timing:
    """The step as if each rank were alone, all at the same time. To be called before DDP has the model."""
    assembly = assemble(
        replace(bench.config, batch_size=bench.share),
        ranks=replace(bench.ranks, world_size=1),
        precision=bench.precision,
        micro_batch=bench.data.micro_batch,
        model=model,
    )
    _first_pass(bench, assembly)
    timing = bench.time(training_step(bench, assembly, resident(bench.data)))
    torch._dynamo.reset()  # inside DDP, the model is compiled in parts, one a bucket: these kernels must not be used again
    return timing


def resident(data: Data) -> Iterator[Batch]:
    """One batch that stays on the device, yielded for ever."""
    return SyntheticLoader(
        batch_size=data.micro_batch,
        crop=data.config.crop,
        classes=len(data.classes),
        device=data.ranks.device,
        half=data.precision.half_images,
        pad_channels=data.config.pad_channels,
        seed=data.ranks.rank,
    )


def training_step(bench: Bench, assembly: Assembly, batches: Iterator[Batch]) -> Callable[[], object]:
    """One step of the training loop, its parts marked."""
    marked = MarkedBatches(batches, bench.laps)
    loss_sum = torch.zeros((), dtype=torch.float64, device=bench.ranks.device)
    return lambda: loss_sum.add_(assembly.step(marked))


def training_batches(bench: Bench) -> Iterator[Batch]:
    """A new loader, for the training loop. Not for synthetic data."""
    return bench.data.train_batches(feed_of(bench, _TRAINING).start)


def time_training(bench: Bench, step: Callable[[], object]) -> Timing:
    """A training step that new training_batches() feed."""
    return bench.time(step, feed=feed_of(bench, _TRAINING))


def host_seconds(bench: Bench, assembly: Assembly, step: Callable[[], object]) -> float | None:
    """Median seconds of the host for one step; None where it cannot be told from the device's. Every rank must call this.

    On a GPU, of steps that are each given to an idle device. On a CPU, where host and device are one, of the same step on
    tensors without data; that is an upper bound, since torch works out the shapes of some of them in Python. Compiled code
    cannot be run so.
    """
    device = bench.ranks.device
    if device.type == "cpu":
        if assembly.compiled:
            return None
        step = _step_without_data(bench)
    seconds = []
    for _ in range(_HOST_STEPS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = perf_counter()
        step()
        seconds.append(perf_counter() - began)
    return statistics.median(seconds)


def _step_without_data(bench: Bench) -> Callable[[], object]:
    config, meta, precision = bench.config, torch.device("meta"), Precision("fp32", "cpu")
    classes = len(bench.data.classes)
    with meta:
        model = VGG(
            config.arch,
            classes=classes,
            crop=config.crop,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
        )
    step = TrainStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, foreach=True),
        scaler=precision.grad_scaler(),
        precision=precision,
        passes=bench.passes,
    )
    batches = SyntheticLoader(
        batch_size=bench.data.micro_batch, crop=config.crop, classes=classes, device=meta, half=False
    )
    step(batches)  # makes the optimizer's state
    return lambda: step(batches)


def all_reduce_alone(network: nn.Module, grad_compression: str) -> tuple[Callable[[], None], int]:
    """Adds up buckets as large as those of DDP over all ranks, at each call; and how many bytes each rank gives.

    network: the DDP module, after three backward passes at least: its final buckets follow the order of the gradients.
    """
    assert isinstance(network, DistributedDataParallel)
    sizes = [int(size) for size in network._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]
    device = next(network.parameters()).device
    buckets = [
        torch.zeros(size // torch.float32.itemsize, dtype=_DTYPES[grad_compression], device=device) for size in sizes
    ]

    def reduce() -> None:
        under_way = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
        for work in under_way:
            work.wait()  # on a GPU it is torch's stream that waits

    return reduce, sum(bucket.nbytes for bucket in buckets)


def _times(count: int, call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(count):
            call()

    return calls


def _first_pass(bench: Bench, assembly: Assembly) -> float:
    began = perf_counter()
    assembly.step.warm_up(*next(resident(bench.data)))
    if bench.ranks.device.type == "cuda":
        torch.cuda.synchronize(bench.ranks.device)
    return perf_counter() - began
