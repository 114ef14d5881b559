"""The stages of a profile, one after the other, each measured with the trainer's own objects.

What feeds a stage begins with it, so that nothing lies ready at first; and its first steps are not counted, as many as may lie
ready later. With --order window, a window of shards is read while the one before it is used up, and comes at once: whole
windows are counted, from the middle of one to the middle of another.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.progress import say
from common.ranks import Ranks
from engine.config import Config
from engine.data import TrainingData, open_training_data
from engine.precision import Precision, choose_precision, set_numerics
from engine.training.assembly import Assembly, assemble, network_of
from engine.training.data_parallel import GRADIENT_DTYPES
from engine.training.decoder_share import find_share
from engine.training.step import TrainStep
from model.vgg import VGG
from perf.costs import Job
from perf.feeds import DECODING, LOADER, NO_FEED, READING, TRAINING, Feed, decoding_alone, feed_of, reading_alone
from perf.hybrid import choose_parallel
from perf.laps import Laps, MarkedBatches, MarkedPrecision
from perf.layers import layer_seconds
from perf.report import Trace
from perf.timing import Limits, Timing, measure
from perf.trace import traced
from pipeline.dali.loader import Batch, DaliLoader, SyntheticLoader

ALL_REDUCE, WITHOUT_ALL_REDUCE = "the all-reduce", "the step without its all-reduce"
_HOST_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A configuration on its ranks, with its data set open, and how its steps are timed."""

    config: Config
    ranks: Ranks
    precision: Precision
    data: TrainingData
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

    def time(self, step: Callable[[], object], *, laps: Laps | None = None, feed: Feed = NO_FEED) -> Timing:
        """Every rank must call this; the steps may wait for each other."""
        limits = replace(self.limits, least_laps=math.ceil(self.limits.least_laps / feed.windows))
        return measure(
            step, laps=laps or self.laps, ranks=self.ranks, limits=limits, queue=feed.queue, period=feed.period
        )


@dataclass(kw_only=True)
class Findings:
    """Of this rank; what is missing or None was not measured, or does not exist in this run."""

    timings: dict[str, Timing] = field(default_factory=dict)
    """By stage of the report, ALL_REDUCE or WITHOUT_ALL_REDUCE."""
    first_batch_seconds: float | None = None
    """From making the loader to its first batch."""
    compile_seconds: float | None = None
    """Of the first pass, compilation included."""
    host_seconds: float | None = None
    """Of the host, a step."""
    all_reduce_bytes: int = 0
    """That each rank gives, a step."""
    layer_seconds: dict[str, float] | None = None
    """Of each layer in one pass, forward and backward."""
    reserved_bytes: int = 0
    """Of the GPU's memory, by torch, at most."""
    trace: Trace | None = None
    sharing: int = 1
    """Ranks that shared FC6 and FC7; 1: each had its own."""


def run_stages(bench: Bench, trace: Path | None) -> Findings:
    """Measure one stage after the other; every rank must call this. trace: the file to write one to."""
    ranks, found = bench.ranks, Findings()
    several, timings = ranks.world_size > 1, found.timings

    def begin(stage: str) -> None:
        if ranks.is_main:
            fed = bench.config.order == "window" and stage in ("reading", "the loader", "training")
            windows = ", or three windows of shards" if fed else ""
            say(f"measuring {stage}, for up to {bench.limits.seconds:g} s{windows}")

    if bench.has_images:
        begin("reading")
        timings["reading"] = time_reading(bench)
        if bench.data.decoder != "none":
            begin("decoding")
            timings["decoding"] = time_decoding(bench)
        begin("the loader")
        timings["loader"], found.first_batch_seconds = time_loader(bench)
    model = build_model(bench)
    if several:
        begin(WITHOUT_ALL_REDUCE)
        timings[WITHOUT_ALL_REDUCE] = time_step_without_all_reduce(bench, model)
    begin("the step")
    assembly, first_pass_seconds = assemble_step(bench, model)
    found.compile_seconds = first_pass_seconds if assembly.compiled else None
    found.sharing = assembly.shared.sharing if assembly.shared else 1
    step = training_step(bench, assembly, bench.data.resident_batches())
    timings["step"] = bench.time(step)
    found.host_seconds = host_seconds(bench, assembly, step)
    if several:
        begin(ALL_REDUCE)
        reduce, found.all_reduce_bytes = all_reduce_alone(assembly.network, bench.config.grad_compression)
        timings[ALL_REDUCE] = bench.time(reduce)
    if bench.has_images:
        begin("training")
        step = fed_step(bench, assembly)
        timings["training"] = time_training(bench, step)
    if ranks.device.type == "cuda":
        found.reserved_bytes = torch.cuda.max_memory_reserved(ranks.device)
    found.trace = traced(step, ranks, trace)
    del step, assembly, model  # their memory is the next network's
    # Eager, one layer after the other, of a network of its own: DDP's and the compiler's hooks are of the whole.
    found.layer_seconds = layer_seconds(
        build_model(bench), next(bench.data.resident_batches()), precision=bench.precision, device=ranks.device
    )
    return found


def open_bench(config: Config, ranks: Ranks, limits: Limits) -> Bench:
    """Raises UserError as open_training_data does.

    The learning rate is 0: the weights stay as they are at first, so that no figure depends on what was measured before it.
    """
    set_numerics(deterministic=config.deterministic)
    laps = Laps(ranks.device)
    plain = choose_precision(config.precision, ranks)
    precision = MarkedPrecision(plain.name, plain.device_type, laps)
    config = replace(config, lr=0.0)
    data = open_training_data(config, ranks, precision)
    config = choose_parallel(config, ranks, Job.of(data))
    return Bench(config=config, ranks=ranks, precision=precision, data=data, laps=laps, limits=limits)


def time_reading(bench: Bench) -> Timing:
    """Nothing but reading what a step needs. Not for synthetic data."""
    feed = feed_of(bench.data, READING)
    read = _times(bench.passes, reading_alone(bench.data, feed.start))
    return bench.time(read, laps=Laps(torch.device("cpu")), feed=feed)


def time_decoding(bench: Bench) -> Timing:
    """Nothing but decoding what a step needs. Not for synthetic data. Raises UserError: an image cannot be decoded."""
    start, prefetch = feed_of(bench.data, DECODING).start, bench.config.prefetch
    decode = _times(bench.passes, decoding_alone(bench.data, start))
    return bench.time(decode, feed=Feed(start=start, queue=prefetch))


def time_loader(bench: Bench) -> tuple[Timing, float]:
    """The loader, of which nobody uses the images; and the seconds until it had the first of them."""
    feed, began = feed_of(bench.data, LOADER), perf_counter()
    batches = bench.data.train_batches(feed.start)
    next(batches)
    first_batch_seconds = perf_counter() - began
    load = _times(bench.passes, lambda: next(batches))
    return bench.time(load, feed=feed), first_batch_seconds


def build_model(bench: Bench) -> VGG:
    return network_of(bench.config, classes=len(bench.data.classes), device=bench.ranks.device)


def assemble_step(bench: Bench, model: VGG) -> tuple[Assembly, float]:
    """The training step, compiled where that is asked for; and the seconds of its first pass, with the compilation."""
    assembly = assemble(
        bench.config, ranks=bench.ranks, precision=bench.precision, micro_batch=bench.data.micro_batch, model=model
    )
    began = perf_counter()
    assembly.step.warm_up(*next(bench.data.resident_batches()))
    if bench.ranks.device.type == "cuda":
        torch.cuda.synchronize(bench.ranks.device)
    return assembly, perf_counter() - began


def time_step_without_all_reduce(bench: Bench, model: VGG) -> Timing:
    """The step as if each rank were alone, all at the same time. To be called before DDP has the model."""
    config = replace(bench.config, batch_size=bench.share, parallel="data")
    alone = replace(bench, config=config, ranks=replace(bench.ranks, world_size=1))
    assembly, _ = assemble_step(alone, model)
    timing = bench.time(training_step(bench, assembly, bench.data.resident_batches()))
    torch._dynamo.reset()  # inside DDP, the model is compiled in parts, one a bucket: these kernels must not be used again
    return timing


def training_step(bench: Bench, assembly: Assembly, batches: Iterator[Batch]) -> Callable[[], object]:
    """One step of the training loop, its parts marked."""
    marked = MarkedBatches(batches, bench.laps)
    loss_sum = torch.zeros((), dtype=torch.float64, device=bench.ranks.device)
    return lambda: loss_sum.add_(assembly.step(marked))


def training_batches(bench: Bench) -> Iterator[Batch]:
    """A new loader, for the training loop. Not for synthetic data."""
    return bench.data.train_batches(feed_of(bench.data, TRAINING).start)


def fed_step(bench: Bench, assembly: Assembly) -> Callable[[], object]:
    """A training step that new training_batches() feed. Every rank must call this.

    Where two decoders share each batch, they do it as they would after the beginning of a training.
    """
    batches = training_batches(bench)
    if bench.data.decoder == "split" and isinstance(batches, DaliLoader):
        share = find_share(batches, bench.data, functools.partial(training_step, bench, assembly))
        batches = training_batches(bench)  # from where feed_of() begins
        assert isinstance(batches, DaliLoader)
        batches.share = share
    return training_step(bench, assembly, batches)


def time_training(bench: Bench, step: Callable[[], object]) -> Timing:
    """A training step that new training_batches() feed."""
    return bench.time(step, feed=feed_of(bench.data, TRAINING))


def host_seconds(bench: Bench, assembly: Assembly, step: Callable[[], object]) -> float | None:
    """Median seconds of the host for one step. Every rank must call this.

    On a GPU, of steps that are each given to an idle device. On a CPU, of the same step on tensors without data: an upper bound,
    since torch works out the shapes of some in Python. None for compiled code on a CPU, which cannot be run so.
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
            fuse=config.fuse,
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
        torch.zeros(size // torch.float32.itemsize, dtype=GRADIENT_DTYPES[grad_compression], device=device)
        for size in sizes
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
