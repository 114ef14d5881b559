"""From --data to loaders: the one place where the configuration meets the pipeline."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import TrainingError, UserError
from common.progress import printable, say, say_once
from common.ranks import Ranks, on_rank_0
from engine.checkpoint import Checkpoint
from engine.config import DIGITS, SYNTHETIC, Config
from engine.networks import Network
from engine.precision import Precision
from pipeline.digits import digits_folder
from pipeline.headers import read_header
from pipeline.loader import Batch, DaliLoader, SyntheticLoader
from pipeline.manifest import open_manifest
from pipeline.manifest_files import QUARANTINE, Manifest, add_to_quarantine, load_manifest
from pipeline.plan import IMAGENET_COLOUR_SHIFT, IMAGENET_MEAN_RGB, ColourShift, Samples, TrainPlan, ValidationPlan
from pipeline.prepared import Prepared, is_prepared, open_prepared
from pipeline.reader import Fetch, ShardReader
from pipeline.statistics import find_statistics
from pipeline.tables import FileTable, ShardTable
from pipeline.whole import WholePlan

Plan = TrainPlan | ValidationPlan | WholePlan

_SYNTHETIC_CLASSES = 1000
_SYNTHETIC_IMAGES = 1_281_167  # ImageNet's, so that an epoch means the same

# A rank's validation batch never depends on the number of ranks: kernels chosen for another batch size round otherwise,
# and an image on the edge would count differently.
_VALIDATION_BATCH = 128
_MOST_THREADS_BESIDE_A_GPU = 8
"""With more, a GPU's decoder is no faster, and training on that GPU slower (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set and the loaders over it."""

    config: Config
    ranks: Ranks
    precision: Precision
    micro_batch: int
    """Images in one training pass of one rank."""
    manifest: Manifest | Prepared | None
    """None for synthetic data."""
    mean_rgb: tuple[float, float, float] = IMAGENET_MEAN_RGB
    """What is subtracted from the pixels (0–255)."""
    colour_shift: ColourShift = IMAGENET_COLOUR_SHIFT
    bad_rows: set[int] = field(default_factory=set)
    """Training rows that this rank found not to be decodable, or not everywhere."""
    bad_val_rows: set[int] = field(default_factory=set)
    """Validation rows that this rank found so."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes if self.manifest else tuple(str(label) for label in range(_SYNTHETIC_CLASSES))

    @property
    def train_images(self) -> int:
        return len(self.manifest.train) if self.manifest else _SYNTHETIC_IMAGES

    @property
    def val_images(self) -> int:
        """Those that can be decoded, as far as is known."""
        return len(self.manifest.val) if self.manifest else 0

    @property
    def val_lost(self) -> int:
        """Validation images that were left out when the data set was scanned or verified."""
        return self.manifest.val_lost if self.manifest else 0

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint if self.manifest else SYNTHETIC

    @property
    def decoder(self) -> str:
        """Where JPEGs are decoded: "gpu" or "cpu"."""
        auto = "gpu" if self.ranks.device.type == "cuda" else "cpu"
        return auto if self.config.decoder == "auto" else self.config.decoder

    @property
    def threads(self) -> int:
        """DALI's CPU threads in this rank."""
        return self.config.threads or default_threads(self.ranks.cpu_share, self.decoder)

    def engine_load(self, *, training: bool) -> float:
        """The share of a loader's images that --decoder gpu gives to the GPU's JPEG engine, in [0, 1].

        Of a batch that the engine shares with other decoders it gets the images that come first by kind and size: an image's
        pixels then depend on its batch-mates, and so on micro-batch and rank count. Where a result must not, the engine
        decodes all or none. None, unless all are asked for: nvImageCodec marks the engine's images good before they are decoded.
        """
        load = self.config.hw_decoder_load
        shares = training and not self.config.deterministic
        return load if shares or load == 1 else 0.0

    def train_batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches of this rank, endless, from sample number `start` on."""
        if self.manifest is None:
            return SyntheticLoader(
                batch_size=self.micro_batch,
                crop=self.config.crop,
                classes=_SYNTHETIC_CLASSES,
                device=self.ranks.device,
                half=self.precision.half_images,
                pad_channels=self.config.pad_channels,
                seed=self.ranks.rank,
            )
        plan = self.train_plan()
        rank, world_size, micro_batch = self.ranks.rank, self.ranks.world_size, self.micro_batch
        return self._loader(
            plan,
            lambda skip: plan.batches(
                start=start, rank=rank, world_size=world_size, micro_batch=micro_batch, skip=skip
            ),
            micro_batch,
            self.bad_rows,
            training=True,
        )

    def train_plan(self) -> TrainPlan:
        """What the training loader shows; not for synthetic data, which has no plan."""
        assert self.manifest
        return TrainPlan(
            table=self.manifest.train,
            batch_size=self.config.batch_size,
            crop=self.config.crop,
            scale=self.config.scale,
            seed=self.config.seed,
            mean_rgb=self.mean_rgb,
            colour_shift=self.colour_shift,
            window_shards=self.config.window_shards if self.config.order == "window" else None,
        )

    def validation_batches(self) -> tuple[Iterator[Batch], int] | None:
        """Batches of this rank, endless, and how many make one pass over the validation set; None for synthetic data."""
        if self.manifest is None:
            return None
        plan = self.validation_plan()
        size = min(self.config.batch_size, self.config.micro_batch or _VALIDATION_BATCH, _VALIDATION_BATCH)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        loader = self._loader(
            plan,
            lambda skip: plan.batches(rank=rank, world_size=world_size, batch_size=size, skip=skip),
            size,
            self.bad_val_rows,
        )
        return loader, plan.steps(world_size=world_size, batch_size=size)

    def whole_batches(self, split: str, pixels: int) -> tuple[Iterator[Batch], int]:
        """This rank's whole images of "train" or "val", each once, and how many they are; not for synthetic data.

        The images' shorter side is the validation scale; those of a batch have one size, and `pixels` together at most, unless
        it is a single one. The labels are the rows' numbers.
        """
        assert self.manifest
        plan = WholePlan(
            table=self.manifest.train if split == "train" else self.manifest.val,
            scale=self.config.validation_scale,
            pixels=pixels,
            mean_rgb=self.mean_rgb,
        )
        rank, world_size = self.ranks.rank, self.ranks.world_size
        for row in plan.too_large.tolist() if self.ranks.is_main else ():
            name, (height, width) = plan.table.name(plan.table.read(np.array([row])).source[0]), plan.size(row)
            say(
                f"warning: {printable(name)} would have {width:,}×{height:,} pixels at a scale of {plan.scale}, more than "
                f"{plan.most_pixels:,}; it counts as lost"
            )
        loader = self._loader(
            plan,
            lambda skip: plan.batches(rank=rank, world_size=world_size, skip=skip),
            plan.largest_batch,
            self.bad_rows if split == "train" else self.bad_val_rows,
            whole=True,
        )
        return loader, plan.images(rank=rank, world_size=world_size)

    def validation_plan(self) -> ValidationPlan:
        """What a validation shows; not for synthetic data."""
        assert self.manifest
        return ValidationPlan(
            table=self.manifest.val,
            crop=self.config.crop,
            scale=self.config.validation_scale,
            mean_rgb=self.mean_rgb,
        )

    def look(self, plan: TrainPlan | ValidationPlan, numbers: np.ndarray) -> tuple[Tensor, Samples]:
        """Some samples of a plan (int64 [n]; rows of a ValidationPlan), loaded as training and validation load them.

        Returns the images, [n, 3 or 4, crop, crop] in the host's memory, and what the plan decided about each.
        """
        size = min(len(numbers), _VALIDATION_BATCH)
        steps = -(-len(numbers) // size)
        filled_up = np.resize(numbers, (steps, size))

        def batches_after(skip: int) -> Iterator[Samples]:
            for step in itertools.count(skip):
                yield plan.samples(filled_up[step % steps])

        loader = self._loader(plan, batches_after, size, self.bad_rows if isinstance(plan, TrainPlan) else set())
        images = torch.cat([next(loader)[0].cpu() for _ in range(steps)])
        # Asked for after the loading, which may have found images to do without.
        return images[: len(numbers)], plan.samples(numbers)

    def max_lost(self, images: int) -> int:
        """Images of a set of so many that may be lost before the run ends."""
        limit = self.config.max_bad_images
        return min(math.ceil(images / 1000) if limit is None else limit, images - 1)

    def _loader(
        self,
        plan: Plan,
        batches_after: Callable[[int], Iterator[Samples]],
        batch_size: int,
        bad_rows: set[int],
        *,
        whole: bool = False,
        training: bool = False,
    ) -> DaliLoader:
        return DaliLoader(
            batches_after,
            lose=lambda samples, dead, reasons: self._lose(plan, bad_rows, samples, dead, reasons),
            batch_size=batch_size,
            crop=None if whole else self.config.crop,
            device=self.ranks.device,
            decoder=self.decoder,
            hw_decoder_load=self.engine_load(training=training),
            half=self.precision.half_images,
            threads=self.threads,
            prefetch=self.config.prefetch,
            pad_channels=self.config.pad_channels,
            fetch=self.fetch(plan),
        )

    def fetch(self, plan: Plan) -> Fetch | None:
        """What adds the images' bytes to the plan's batches, in threads of its own; None where DALI reads files itself."""
        if not isinstance(plan.table, ShardTable):
            return None
        reader = ShardReader(plan.table, threads=self.config.read_threads, batches_ahead=self.config.read_ahead)
        return lambda batches: reader.fetch(batches, plan.read_group)

    def _lose(
        self,
        plan: Plan,
        bad_rows: set[int],
        samples: Samples,
        dead: np.ndarray,
        reasons: list[str],
    ) -> None:
        """Have the plan do without some samples; warn of each file once, and add it to the quarantine."""
        assert self.manifest
        plan.lose(samples, dead)
        news = {}
        for index, (row, reason) in enumerate(zip(samples.rows.tolist(), reasons, strict=True)):
            if row not in bad_rows:
                bad_rows.add(row)
                name = plan.table.name(samples.source[index])
                if isinstance(plan.table, FileTable):  # "empty file" says more than the decoder does
                    reason = read_header(Path(name)).reason or reason
                news[name] = reason
        for name, reason in news.items():
            say(f"warning: {printable(name)} cannot be decoded ({reason}); going on without it")
        try:
            add_to_quarantine(self.manifest.folder, self.manifest.root, news)
        except OSError as error:
            say_once(f"warning: {self.manifest.folder / QUARANTINE} cannot be added to ({error.strerror})")
        check_lost(len(bad_rows), self.max_lost(len(plan.table)), self.manifest.folder)


def check_lost(lost: int, limit: int, manifest_folder: Path) -> None:
    """Raise TrainingError where more images are lost than may be."""
    if lost > limit:
        raise TrainingError(
            f"{lost} images cannot be decoded, more than the {limit} that --max-bad-images allows; they were named above, and "
            f"are listed in {manifest_folder / QUARANTINE} where that can be written"
        )


def default_threads(cores: int, decoder: str) -> int:
    """DALI's CPU threads in a rank that has so many cores. decoder: "gpu" or "cpu"."""
    threads = cores + 1  # each waits at the end of every operator
    return threads if decoder == "cpu" else min(threads, _MOST_THREADS_BESIDE_A_GPU)


def open_data(
    config: Config,
    ranks: Ranks,
    precision: Precision,
    *,
    checkpoint: Checkpoint | None = None,
    initial: Network | None = None,
) -> Data:
    """Find or make the data set and check that its batches divide among the ranks. Raises UserError.

    checkpoint, initial: what the run goes on from, or starts with. The mean and the colour shift are the checkpoint's; or the
    mean is the initial network's; what is left is the data set's, where pipeline.statistics has computed it, or ImageNet's.

    Rank 0 scans a new data set while the others wait; after that, every rank maps the same files. On a machine that does
    not share rank 0's folders, its ranks make the manifest there: it must come out the same.
    """
    if config.decoder == "gpu" and ranks.device.type != "cuda":
        raise UserError("--decoder gpu: needs a GPU; use --decoder cpu or auto")
    micro_batch = _micro_batch(config, ranks)
    manifest = None if config.data == SYNTHETIC else _shared_manifest(config, ranks)
    mean_rgb, colour_shift = _colours(manifest, checkpoint, initial, ranks)
    return Data(
        config=config,
        ranks=ranks,
        precision=precision,
        micro_batch=micro_batch,
        manifest=manifest,
        mean_rgb=mean_rgb,
        colour_shift=colour_shift,
    )


def _colours(
    manifest: Manifest | Prepared | None, checkpoint: Checkpoint | None, initial: Network | None, ranks: Ranks
) -> tuple[tuple[float, float, float], ColourShift]:
    if checkpoint:
        red, green, blue = checkpoint.mean_rgb
        return (red, green, blue), tuple((x, y, z) for x, y, z in checkpoint.colour_shift)
    mean_rgb, colour_shift = IMAGENET_MEAN_RGB, IMAGENET_COLOUR_SHIFT
    # Rank 0 reads them for all: a machine that does not share its folders may have others, or none.
    statistics = on_rank_0(ranks, lambda: find_statistics(manifest) if manifest else None)
    if statistics:
        mean_rgb, colour_shift = statistics.mean_rgb, statistics.colour_shift
    if initial:
        mean_rgb = initial.mean_rgb
    if ranks.is_main and (statistics or initial):
        shift = "the data set's statistics" if statistics else "ImageNet"
        mean = initial.name if initial else shift
        say(f"mean RGB {', '.join(f'{value:.2f}' for value in mean_rgb)} from {mean}, colour shift from {shift}")
    return mean_rgb, colour_shift


def _shared_manifest(config: Config, ranks: Ranks) -> Manifest | Prepared:
    data = config.data
    manifest: Manifest | Prepared
    if data != DIGITS and is_prepared(data):
        fingerprint = on_rank_0(ranks, lambda: open_prepared(data).fingerprint)
        manifest = open_prepared(data, check_shards=False)
    else:
        if config.order == "window":
            raise UserError("--order window: needs prepared data; make it with python -m pipeline.prepare")
        root, folder, fingerprint = on_rank_0(ranks, lambda: _open_first(data))
        if not ranks.is_main:
            root, folder = _open_again(data, root, folder, fingerprint)
        manifest = load_manifest(root, folder)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"--data {data}: rank {ranks.rank} sees other images than rank 0; copy the data set anew")
    return manifest


def _open_first(data: str) -> tuple[Path, Path, str]:
    manifest = open_manifest(digits_folder() if data == DIGITS else Path(data))
    return manifest.root, manifest.folder, manifest.fingerprint


def _open_again(data: str, root: Path, folder: Path, fingerprint: str) -> tuple[Path, Path]:
    """Rank 0's folders where this machine shares them, else its own."""
    with contextlib.suppress(UserError):
        if load_manifest(root, folder).fingerprint == fingerprint:
            return root, folder
    return _open_first(data)[:2]


def _micro_batch(config: Config, ranks: Ranks) -> int:
    """The largest divisor of the rank's share that --micro-batch allows: the share changes with the number of ranks."""
    share, remainder = divmod(config.batch_size, ranks.world_size)
    if remainder:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide among {ranks.world_size} ranks; run on a number of ranks "
            f"that divides it, or take a multiple of {ranks.world_size}"
        )
    limit = min(config.micro_batch or share, share)
    size = next(size for size in range(limit, 0, -1) if share % size == 0)
    if 2 * size < limit and ranks.is_main:
        step = limit * ranks.world_size
        less, more = config.batch_size // step * step, -(-config.batch_size // step) * step
        say(
            f"warning: --micro-batch {limit}: a rank's {share} images divide into passes of {size} at most; "
            f"--batch-size {less} or {more} makes passes of {limit}"
        )
    return size
