"""From --data to loaders: the one place where the flags meet the pipeline."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.progress import printable, say
from common.ranks import Ranks, on_rank_0
from engine.checkpoint import Checkpoint
from engine.config import SYNTHETIC, Config, LoadingFlags
from engine.networks import Network
from engine.precision import Precision
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import Batch, DaliLoader, SyntheticLoader
from pipeline.dali.lost_images import LostImages
from pipeline.dali.opening import Plan, default_threads, fetch_ahead, one_decoder, open_data_set, open_loader
from pipeline.dataset.digits import DIGITS
from pipeline.dataset.manifest import Manifest, load_manifest
from pipeline.dataset.scan import SPLITS
from pipeline.plan.samples import IMAGENET_MEAN_RGB, Samples
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT, ColourShift, RandomResized, TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.plan.whole_images import WholePlan
from pipeline.preparation.statistics import find_statistics
from pipeline.shards.index import Prepared, is_prepared, open_prepared
from pipeline.shards.reader import Fetch

_SYNTHETIC_CLASSES = 1000
_SYNTHETIC_IMAGES = 1_281_167  # ImageNet's, so that an epoch means the same

# A rank's validation batch never depends on the number of ranks: kernels chosen for another batch size round otherwise,
# and an image on the edge would count differently.
_VALIDATION_BATCH = 128
_CORES_TO_FEED_A_GPU = 12
"""About as many decode what a GPU trains D on (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """How a network is shown images that it does not learn from."""

    crop: int
    """Side of the network's input in pixels."""
    scale: int
    """Shorter side of the rescaled image in pixels, at least `crop`."""
    mean_rgb: tuple[float, float, float]
    """What is subtracted from the pixels (0–255)."""
    std_rgb: tuple[float, float, float]
    """What they are then divided by."""
    batch_size: int
    """Images of the crop's size that a rank computes at a time; of larger ones, as many as have no more pixels."""
    pad_channels: bool = False
    """As --pad-channels."""

    @property
    def pixels(self) -> int:
        """In a batch."""
        return self.batch_size * self.crop**2


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set on these ranks, and loaders that show it to networks."""

    ranks: Ranks
    precision: Precision
    loading: LoadingFlags
    manifest: Manifest | Prepared | None
    """None for synthetic data."""
    lost: dict[str, LostImages]
    """By split; none for synthetic data."""

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
    def one_decoder(self) -> str:
        """Where JPEGs are decoded, all of a batch: "gpu" or "cpu"; "none" where the images are kept as pixels."""
        return one_decoder(self.loading.decoder, self.manifest, on_gpu=self.ranks.device.type == "cuda")

    @property
    def decoder(self) -> str:
        """As one_decoder; or, in training alone, "split": each batch is shared between the two."""
        return self.one_decoder

    @property
    def threads(self) -> int:
        """DALI's CPU threads in this rank."""
        return self.loading.threads or default_threads(self.ranks.cpu_share, self.decoder)

    def validation_batches(self, viewing: Viewing) -> tuple[Iterator[Batch], int] | None:
        """Batches of this rank, endless, and how many make one pass over the validation set; None for synthetic data."""
        if self.manifest is None:
            return None
        plan = self.validation_plan(viewing)
        size = min(viewing.batch_size, _VALIDATION_BATCH)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        loader = self.loader(
            plan,
            lambda skip: plan.batches(rank=rank, world_size=world_size, batch_size=size, skip=skip),
            size,
            "val",
            self._options(viewing.crop, viewing.std_rgb, viewing.pad_channels),
        )
        return loader, plan.steps(world_size=world_size, batch_size=size)

    def whole_batches(self, viewing: Viewing, split: str) -> tuple[Iterator[Batch], int]:
        """This rank's whole images of "train" or "val", each once, and how many they are; not for synthetic data.

        The images of a batch have one size, and viewing.pixels together at most, unless it is a single one. The labels are the
        rows' numbers.
        """
        assert self.manifest
        plan = WholePlan(
            table=self.manifest.train if split == "train" else self.manifest.val,
            scale=viewing.scale,
            pixels=viewing.pixels,
            mean_rgb=viewing.mean_rgb,
        )
        rank, world_size = self.ranks.rank, self.ranks.world_size
        for row in plan.too_large.tolist() if self.ranks.is_main else ():
            name, (height, width) = plan.table.name(plan.table.read(np.array([row])).source[0]), plan.size(row)
            say(
                f"warning: {printable(name)} would have {width:,}×{height:,} pixels at a scale of {plan.scale}, more than "
                f"{plan.most_pixels:,}; it counts as lost"
            )
        loader = self.loader(
            plan,
            lambda skip: plan.batches(rank=rank, world_size=world_size, skip=skip),
            plan.largest_batch,
            split,
            self._options(None, viewing.std_rgb, viewing.pad_channels),
        )
        return loader, plan.images(rank=rank, world_size=world_size)

    def validation_plan(self, viewing: Viewing) -> ValidationPlan:
        """What a validation shows; not for synthetic data."""
        assert self.manifest
        return ValidationPlan(
            table=self.manifest.val, crop=viewing.crop, scale=viewing.scale, mean_rgb=viewing.mean_rgb
        )

    def fetch(self, plan: Plan) -> Fetch | None:
        """What adds the images' bytes to the plan's batches; None where DALI reads files itself."""
        return fetch_ahead(plan, threads=self.loading.read_threads, batches_ahead=self.loading.read_ahead)

    def _options(
        self,
        crop: int | None,
        std_rgb: tuple[float, float, float],
        pad_channels: bool,
        *,
        mixes_decoders: bool = False,
    ) -> GraphOptions:
        """mixes_decoders: whether the GPU's JPEG engine may decode a part of each batch, and the CPU another one.

        The engine then gets the images that come first by kind and size, and the CPU those that come first in the batch. So an
        image's pixels depend on its batch-mates, and with them on micro-batch and rank count. Where a result must not, one
        decoder has all images, and the engine decodes all or none of them. None, unless all are asked for: nvImageCodec marks
        the engine's images good before they are decoded.
        """
        device, load = self.ranks.device, self.loading.hw_decoder_load
        return GraphOptions(
            crop=crop,
            std_rgb=std_rgb,
            device_id=device.index if device.type == "cuda" else None,
            decoder=self.decoder if mixes_decoders else self.one_decoder,
            hw_decoder_load=load if mixes_decoders or load == 1 else 0.0,
            half=self.precision.half_images,
            pad_channels=pad_channels,
            threads=self.threads,
            prefetch=self.loading.prefetch,
        )

    def loader(
        self,
        plan: Plan,
        batches_after: Callable[[int], Iterator[Samples]],
        batch_size: int,
        split: str,
        options: GraphOptions,
    ) -> DaliLoader:
        return open_loader(
            plan, batches_after, options, lost=self.lost[split], batch_size=batch_size, fetch=self.fetch(plan)
        )


@dataclass(frozen=True, kw_only=True)
class TrainingData(Data):
    """A data set to train on, and to validate on."""

    config: Config
    micro_batch: int
    """Images in one training pass of one rank."""
    mean_rgb: tuple[float, float, float] = IMAGENET_MEAN_RGB
    """What is subtracted from the pixels (0–255)."""
    colour_shift: ColourShift = IMAGENET_COLOUR_SHIFT

    @property
    def viewing(self) -> Viewing:
        """As a validation during the training has it."""
        config = self.config
        return Viewing(
            crop=config.crop,
            scale=config.test_scale,
            mean_rgb=self.mean_rgb,
            std_rgb=config.std_rgb,
            batch_size=min(config.batch_size, config.micro_batch or _VALIDATION_BATCH),
            pad_channels=config.pad_channels,
        )

    @property
    def decoder(self) -> str:
        one = self.one_decoder
        shared = self.loading.decoder == "split" and self.manifest is not None and not self.config.deterministic
        return "split" if shared and one != "none" else one

    @property
    def first_share(self) -> float:
        """Of each batch, what the CPU's decoder gets at first where the two share it."""
        return min(1.0, self.ranks.cpu_share / _CORES_TO_FEED_A_GPU)

    @property
    def train_options(self) -> GraphOptions:
        """Of the training loader."""
        config = self.config
        return self._options(config.crop, config.std_rgb, config.pad_channels, mixes_decoders=not config.deterministic)

    def train_batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches of this rank, endless, from sample number `start` on."""
        if self.manifest is None:
            return self.resident_batches()
        plan = self.train_plan()
        rank, world_size, size = self.ranks.rank, self.ranks.world_size, self.micro_batch
        loader = self.loader(
            plan,
            lambda skip: plan.batches(start=start, rank=rank, world_size=world_size, micro_batch=size, skip=skip),
            size,
            "train",
            self.train_options,
        )
        loader.share = self.first_share
        return loader

    def resident_batches(self) -> Iterator[Batch]:
        """A micro-batch of noise that stays on the device, yielded for ever."""
        return SyntheticLoader(
            batch_size=self.micro_batch,
            crop=self.config.crop,
            classes=len(self.classes),
            device=self.ranks.device,
            half=self.precision.half_images,
            pad_channels=self.config.pad_channels,
            seed=self.ranks.rank,
        )

    def blank_batch(self) -> Batch:
        """A micro-batch of zeros on the device, as the training loader's are otherwise."""
        dtype = torch.float16 if self.precision.half_images else torch.float32
        size, crop, channels = self.micro_batch, self.config.crop, 4 if self.config.pad_channels else 3
        images = torch.zeros(size, channels, crop, crop, dtype=dtype, device=self.ranks.device)
        labels = torch.zeros(size, dtype=torch.int64, device=self.ranks.device)
        return images.to(memory_format=torch.channels_last), labels

    def halved(self) -> "TrainingData":
        """The same in micro-batches of half as many images, or of fewer where only those divide the rank's share; as if
        --micro-batch had asked for them."""
        size = _micro_batch(replace(self.config, micro_batch=self.micro_batch // 2), self.ranks)
        return replace(self, config=replace(self.config, micro_batch=size), micro_batch=size)

    def train_plan(self) -> TrainPlan:
        """What the training loader shows; not for synthetic data, which has no plan."""
        assert self.manifest
        config = self.config
        is_resized = config.crop_mode == "random-resized"
        return TrainPlan(
            table=self.manifest.train,
            batch_size=config.batch_size,
            crop=config.crop,
            scale=config.scale,
            seed=config.seed,
            random_resized=RandomResized(config.area, config.aspect) if is_resized else None,
            mean_rgb=self.mean_rgb,
            colour_shift=self.colour_shift,
            window_shards=config.window_shards if config.order == "window" else None,
        )

    def look(self, plan: TrainPlan | ValidationPlan, numbers: np.ndarray) -> tuple[Tensor, Samples]:
        """Some samples of a plan (int64 [n]; rows of a ValidationPlan), loaded as validation loads them.

        Returns the images, [n, 3 or 4, crop, crop] in the host's memory, and what the plan decided about each.
        """
        size = min(len(numbers), _VALIDATION_BATCH)
        steps = -(-len(numbers) // size)
        filled_up = np.resize(numbers, (steps, size))

        def batches_after(skip: int) -> Iterator[Samples]:
            for step in itertools.count(skip):
                yield plan.samples(filled_up[step % steps])

        split, config = "train" if isinstance(plan, TrainPlan) else "val", self.config
        loader = self.loader(
            plan, batches_after, size, split, self._options(config.crop, config.std_rgb, config.pad_channels)
        )
        images = torch.cat([next(loader)[0].cpu() for _ in range(steps)])
        # Asked for after the loading, which may have found images to do without.
        return images[: len(numbers)], plan.samples(numbers)


def open_data(
    source: str, ranks: Ranks, precision: Precision, loading: LoadingFlags, *, max_bad_images: int | None
) -> Data:
    """Find or make the data set of --data. Raises UserError.

    Rank 0 scans a new data set while the others wait; after that, every rank maps the same files. On a machine that does
    not share rank 0's folders, its ranks make the manifest there: it must come out the same.
    """
    if loading.decoder in ("gpu", "split") and ranks.device.type != "cuda":
        raise UserError(f"--decoder {loading.decoder}: needs a GPU; use --decoder cpu or auto")
    manifest = None if source == SYNTHETIC else _shared_manifest(source, ranks)
    lost = (
        {split: LostImages(manifest=manifest, split=split, max_bad_images=max_bad_images) for split in SPLITS}
        if manifest
        else {}
    )
    return Data(ranks=ranks, precision=precision, loading=loading, manifest=manifest, lost=lost)


def open_training_data(
    config: Config,
    ranks: Ranks,
    precision: Precision,
    *,
    checkpoint: Checkpoint | None = None,
    initial: Network | None = None,
) -> TrainingData:
    """Like open_data, and check that the batches divide among the ranks. Raises UserError.

    checkpoint, initial: what the run goes on from, or starts with. The mean and the colour shift are the checkpoint's; or the
    mean is the initial network's; what is left is the data set's, where pipeline.statistics has computed it, or ImageNet's.
    """
    micro_batch = _micro_batch(config, ranks)
    if config.order == "window" and (
        config.data == DIGITS or not (config.data == SYNTHETIC or is_prepared(config.data))
    ):
        raise UserError("--order window: needs prepared data; make it with python -m pipeline.prepare")
    data = open_data(config.data, ranks, precision, config, max_bad_images=config.max_bad_images)
    mean_rgb, colour_shift = _colours(data.manifest, checkpoint, initial, ranks)
    return TrainingData(
        **vars(data), config=config, micro_batch=micro_batch, mean_rgb=mean_rgb, colour_shift=colour_shift
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


def _shared_manifest(data: str, ranks: Ranks) -> Manifest | Prepared:
    manifest: Manifest | Prepared
    if data != DIGITS and is_prepared(data):
        fingerprint = on_rank_0(ranks, lambda: open_prepared(data).fingerprint)
        manifest = open_prepared(data, check_shards=False)
    else:
        root, folder, fingerprint = on_rank_0(ranks, lambda: _open_first(data))
        if not ranks.is_main:
            root, folder = _open_again(data, root, folder, fingerprint)
        manifest = load_manifest(root, folder)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"--data {data}: rank {ranks.rank} sees other images than rank 0; copy the data set anew")
    return manifest


def _open_first(data: str) -> tuple[Path, Path, str]:
    manifest = open_data_set(data)
    return Path(manifest.root), manifest.folder, manifest.fingerprint


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
    if size == 1 and config.mixes:
        raise UserError(
            "--mixup and --cutmix mix the images of one pass, which has only one here; take a larger --micro-batch or "
            "--batch-size, or fewer ranks"
        )
    return size
