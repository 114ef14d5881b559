"""The stages of a profile, each measured with the trainer's own objects."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from common.ranks import Ranks
from engine.assembly import Assembly, assemble, network_of
from engine.config import Config
from engine.data import Data, open_data
from engine.precision import Precision, choose_precision, set_numerics
from model.vgg import VGG
from perf.adaptive import Limits, Timing, measure
from perf.laps import Laps, MarkedBatches, MarkedPrecision
from perf.loader_parts import decoding_alone, reading_alone
from pipeline.loader import Batch, SyntheticLoader

_STAGES_WITH_DATA = 4


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

    def time(self, step: Callable[[], object], *, laps: Laps | None = None, queue: int = 0) -> Timing:
        """Every rank must call this; the steps may wait for each other. queue: as for measure()."""
        return measure(step, laps=laps or self.laps, ranks=self.ranks, limits=self.limits, queue=queue)


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
    read = reading_alone(bench.data, _start(bench, 0))
    return bench.time(_times(bench.passes, read), laps=Laps(torch.device("cpu")), queue=bench.config.prefetch)


def time_decoding(bench: Bench) -> Timing:
    """Nothing but decoding what a step needs. Not for synthetic data. Raises UserError: an image cannot be decoded."""
    decode = decoding_alone(bench.data, _start(bench, 1))
    return bench.time(_times(bench.passes, decode), queue=bench.config.prefetch)


def time_loader(bench: Bench) -> tuple[Timing, float]:
    """The loader, of which nobody uses the images; and the seconds until it had the first of them."""
    began = perf_counter()
    batches = bench.data.train_batches(_start(bench, 2))
    next(batches)
    first_batch_seconds = perf_counter() - began
    return bench.time(_times(bench.passes, lambda: next(batches)), queue=bench.config.prefetch), first_batch_seconds


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
    """A new loader, for the training loop."""
    return bench.data.train_batches(_start(bench, 3))


def _start(bench: Bench, stage: int) -> int:
    """The first sample of a stage. Each begins elsewhere in the epoch, so that of a data set that is larger than the memory
    none finds in the page cache what the one before it has read."""
    return stage * bench.data.train_images // _STAGES_WITH_DATA


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
