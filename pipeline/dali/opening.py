"""From a data set's name to a plan's loader: what the trainer (engine/data.py) and the library (pipeline/library.py) share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.dali.lost_images import LostImages
from pipeline.dataset.digits import DIGITS, digits_folder
from pipeline.dataset.manifest import Manifest, open_manifest
from pipeline.plan.samples import Samples
from pipeline.plan.training import TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.plan.whole_images import WholePlan
from pipeline.shards.index import Prepared, is_prepared, open_prepared
from pipeline.shards.reader import Fetch, ShardReader
from pipeline.shards.shard_table import ShardTable

Plan = TrainPlan | ValidationPlan | WholePlan

_MOST_THREADS_BESIDE_A_GPU = 8
"""With more, a GPU's decoder is no faster, and training on that GPU slower (docs/performance.md)."""


def open_data_set(data: str) -> Manifest | Prepared:
    """Open the data set of --data, which is not synthetic; scan a folder, or write the digits, where that has not been done.

    Raises UserError, as open_manifest and open_prepared do.
    """
    if data == DIGITS:
        return open_manifest(digits_folder())
    return open_prepared(data) if is_prepared(data) else open_manifest(Path(data))


def one_decoder(decoder: str, data: Manifest | Prepared | None, *, on_gpu: bool) -> str:
    """Where all of a batch is decoded: "gpu" or "cpu"; "none" where the images are kept as pixels. decoder: as --decoder has it;
    all but "gpu" and "cpu" is where the images go."""
    if isinstance(data, Prepared) and data.train.is_raw:
        return "none"
    return decoder if decoder in ("gpu", "cpu") else "gpu" if on_gpu else "cpu"


def default_threads(cores: int, decoder: str) -> int:
    """DALI's CPU threads in a rank that has so many cores. decoder: as GraphOptions has it."""
    threads = cores + 1  # each waits at the end of every operator
    return min(threads, _MOST_THREADS_BESIDE_A_GPU) if decoder == "gpu" else threads


def fetch_ahead(plan: Plan, *, threads: int | None, batches_ahead: int) -> Fetch | None:
    """What adds the images' bytes to the plan's batches, in threads of its own; None where DALI reads files itself.

    threads, batches_ahead: as ShardReader has them.
    """
    if not isinstance(plan.table, ShardTable):
        return None
    reader = ShardReader(plan.table, threads=threads, batches_ahead=batches_ahead)
    return lambda batches: reader.fetch(batches, plan.read_group)


def open_loader(
    plan: Plan,
    batches_after: Callable[[int], Iterator[Samples]],
    options: GraphOptions,
    *,
    lost: LostImages,
    batch_size: int,
    fetch: Fetch | None,
) -> DaliLoader:
    """A loader that tells `plan` and `lost` of the images that cannot be decoded; the rest is as DaliLoader has it."""

    def lose(samples: Samples, dead: np.ndarray, reasons: list[str]) -> None:
        plan.lose(samples, dead)
        lost.add(samples, reasons)

    return DaliLoader(batches_after, options, lose=lose, batch_size=batch_size, fetch=fetch)
