"""Loaders for a training loop of your own, with any network: from pipeline import TrainLoader, ValidationLoader

docs/library.md has a whole training. Batches are as pipeline/dali/loader.py describes them, on the device, on torch's current
stream. Every rank has loaders of its own.
"""

import itertools
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist

from common.process import MOST_THREADS, usable_cores
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import Batch, DaliLoader
from pipeline.dali.lost_images import LostImages
from pipeline.dali.opening import default_threads, fetch_ahead, one_decoder, open_data_set, open_loader
from pipeline.plan.samples import IMAGENET_MEAN_RGB, LOST_LABEL, Samples
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT, ColourShift, RandomResized, TrainPlan
from pipeline.plan.validation import ValidationPlan

IGNORED_LABEL = -100
"""Label of validation images that cannot be decoded: torch's cross_entropy leaves it out, and no class has it."""

_READ_AHEAD = 8  # batches of prepared data, as --read-ahead has it


@dataclass(kw_only=True, eq=False)
class _Loader:
    """What both loaders are told."""

    data: str | Path = field(kw_only=False)
    """A folder with train/<class>/* and val/<class>/*; a folder or s3:// URL with prepared data; or "digits" (built in)."""
    batch_size: int
    """Images in a batch, over all ranks together; a multiple of world_size."""
    crop: int = 224
    """Side of the images that come out, in pixels."""
    mean_rgb: tuple[float, float, float] = IMAGENET_MEAN_RGB
    """What is subtracted from the pixels (0–255)."""
    std_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What they are then divided by."""
    rank: int = field(default_factory=lambda: dist.get_rank() if dist.is_initialized() else 0)
    """Of this process. Default: its rank in torch's process group; 0 where there is none."""
    world_size: int = field(default_factory=lambda: dist.get_world_size() if dist.is_initialized() else 1)
    """How many processes share each batch. Default: all of torch's process group; 1 where there is none."""
    device: torch.device | str = "cpu"
    """Where the batches come out: "cpu", or a GPU; "cuda" is the current one."""
    half: bool = False
    """float16 images instead of float32; on a GPU only, since DALI's operators for a CPU cannot."""
    decoder: Literal["auto", "gpu", "cpu"] = "auto"
    """Where JPEGs are decoded. auto: on `device`."""
    hw_decoder_load: float = 0.0
    """The share of the images, in [0, 1], that a GPU's decoder gives to the JPEG engine. Between 0 and 1, an image's pixels
    depend on the others of its batch, by rounding, and so on the number of ranks."""
    threads: int | None = None
    """DALI's CPU threads. Default: as many as suit this rank's share of the cores."""
    prefetch: int = 2
    """Batches that DALI prepares in advance."""
    max_bad_images: int | None = None
    """How many images may turn out not to be decodable; one more is a TrainingError. Default: 0.1 % of the images."""

    _split: ClassVar[str]

    def __post_init__(self) -> None:
        device = torch.device(self.device)
        on_gpu = device.type == "cuda"
        _check(on_gpu or device.type == "cpu", f"device {device}: must be cpu or cuda")
        _check(self.decoder in ("auto", "gpu", "cpu"), f"decoder {self.decoder!r}: must be auto, gpu or cpu")
        _check(0 <= self.hw_decoder_load <= 1, f"hw_decoder_load {self.hw_decoder_load}: must be in [0, 1]")
        _check(self.prefetch >= 1, f"prefetch {self.prefetch}: must be at least 1")
        threads_fit = self.threads is None or 1 <= self.threads <= MOST_THREADS
        _check(threads_fit, f"threads {self.threads}: must be in [1, {MOST_THREADS}]")
        _check(all(std > 0 for std in self.std_rgb), f"std_rgb {self.std_rgb}: must be above 0")
        _check(on_gpu or self.decoder != "gpu", "decoder 'gpu': needs a GPU as device")
        _check(on_gpu or not self.half, "half: needs a GPU as device")
        _check(0 <= self.rank < self.world_size, f"rank {self.rank}: must be in [0, {self.world_size})")
        share, remainder = divmod(self.batch_size, self.world_size)
        _check(share > 0 and not remainder, f"batch_size {self.batch_size}: not a multiple of {self.world_size} ranks")
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or "1"  # as torchrun has it
        is_count = ranks_here.isdecimal() and int(ranks_here) > 0
        _check(is_count, f"LOCAL_WORLD_SIZE={ranks_here}: must be a whole number above 0")
        self._manifest = open_data_set(str(self.data))
        decoder = one_decoder(self.decoder, self._manifest, on_gpu=on_gpu)
        self._table = self._manifest.train if self._split == "train" else self._manifest.val
        self._lost = LostImages(manifest=self._manifest, split=self._split, max_bad_images=self.max_bad_images)
        self._share = share
        self._options = GraphOptions(
            crop=self.crop,
            std_rgb=self.std_rgb,
            device_id=_index_of(device) if on_gpu else None,
            decoder=decoder,
            hw_decoder_load=self.hw_decoder_load,
            half=self.half,
            threads=self.threads or default_threads(max(1, usable_cores() // int(ranks_here)), decoder),
            prefetch=self.prefetch,
        )

    @property
    def images(self) -> int:
        """In the data set's split."""
        return len(self._table)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the labels."""
        return self._manifest.classes


@dataclass(kw_only=True, eq=False)
class TrainLoader(_Loader):
    """Training images, as the paper augments them: rescaled, cropped at random, flipped, their colours shifted.

        loader = TrainLoader("/data/imagenet", batch_size=256, scale=(256, 512), device="cuda")
        for epoch in range(epochs):
            for images, labels in loader: ...

    images: float32 or float16 [batch_size / world_size, 3, crop, crop] on the device, channels_last: 0–255 grey levels, less the
    mean, divided by the std. labels: int64 [batch_size / world_size]. The fields are the arguments, each with its description.

    What a batch shows is a function of the seed and of the number of samples seen before it. All batches are full: where the N
    images do not divide into batches, one may hold the end of an epoch and the beginning of the next, so that each image is used
    exactly once in every N samples. An iteration ends with the batch that completes an epoch. n epochs are ⌈n·N / batch_size⌉
    batches; an iteration has N / batch_size of them, rounded up or down, as len() says. After a break, the next iteration
    continues the same epoch.

    The state is one integer. With it and the same seed, a loader continues in mid-epoch exactly, on any number of ranks.

    An image that cannot be decoded is named in a warning, and another takes its place. Raises ValueError: an argument is wrong;
    UserError: the data set is; in an iteration, TrainingError: too many images cannot be decoded; DataSourceError: the storage
    fails. After an error, too, the state counts just the batches that have come out.
    """

    scale: tuple[int, int] = (256, 256)
    """Lowest and highest training scale S, both included; S is the shorter side after the rescale in pixels, at least `crop`."""
    random_resized: RandomResized | None = None
    """Crops as torchvision's RandomResizedCrop takes them, instead of the paper's; `scale` then has no meaning."""
    seed: int = 0
    """Of the order of the images and their augmentation."""
    colour_shift: ColourShift = IMAGENET_COLOUR_SHIFT
    """AlexNet's; ((0, 0, 0),) * 3 for none."""

    _split = "train"

    def __post_init__(self) -> None:
        lowest, highest = self.scale
        fits = 0 < self.crop <= lowest <= highest or (self.random_resized is not None and self.crop > 0)
        _check(fits, f"scale {self.scale}: must not fall, nor be below crop {self.crop}")
        if crops := self.random_resized:
            ranges = 0 < crops.area[0] <= crops.area[1] <= 1 and 0 < crops.aspect[0] <= crops.aspect[1]
            _check(ranges, f"random_resized {crops}: area must be in (0, 1], aspect above 0, neither may fall")
        super().__post_init__()
        self._plan = TrainPlan(
            table=self._table,
            batch_size=self.batch_size,
            crop=self.crop,
            scale=self.scale,
            seed=self.seed,
            random_resized=self.random_resized,
            mean_rgb=self.mean_rgb,
            colour_shift=self.colour_shift,
        )
        self._samples_seen = 0
        self._batches: DaliLoader | None = None  # whose next batch begins with sample number _samples_seen

    def __len__(self) -> int:
        """Batches of the whole epoch that the next one belongs to."""
        offset = self._samples_seen % self.batch_size  # 0, unless the state is of another batch size

        def batches_before(number: int) -> int:
            return -((offset - number) // self.batch_size)  # rounded up

        return batches_before((self.epoch + 1) * self.images) - batches_before(self.epoch * self.images)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of the epoch."""
        end = (self.epoch + 1) * self.images
        while self._samples_seen < end:
            yield self._next()

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self._samples_seen // self.images

    def state_dict(self) -> dict[str, int]:
        """The same on every rank. It counts the batch that the body of a loop is working on."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next iteration continue there. Raises KeyError, TypeError or ValueError: no state of a TrainLoader."""
        samples_seen = operator.index(state["samples_seen"])
        _check(samples_seen >= 0, f"samples_seen {samples_seen}: must not be negative")
        self._samples_seen, self._batches = samples_seen, None

    def _next(self) -> Batch:
        try:
            self._batches = self._batches or self._open(self._samples_seen)
            batch = next(self._batches)
            self._samples_seen += self.batch_size
        except BaseException:  # after Ctrl-C, a batch may have come out of it that nobody has seen
            self._batches = None
            raise
        return batch

    def _open(self, start: int) -> DaliLoader:
        plan, rank, world_size = self._plan, self.rank, self.world_size
        return open_loader(
            plan,
            lambda skip: plan.batches(
                start=start, rank=rank, world_size=world_size, micro_batch=self._share, skip=skip
            ),
            self._options,
            lost=self._lost,
            batch_size=self._share,
            fetch=fetch_ahead(plan, threads=None, batches_ahead=_READ_AHEAD),
        )


@dataclass(kw_only=True, eq=False)
class ValidationLoader(_Loader):
    """The centre crop of every validation image, each exactly once over all ranks, in the order of the classes.

        for images, labels in ValidationLoader("/data/imagenet", batch_size=256, device="cuda"): ...

    images, labels and errors are as TrainLoader has them. Every iteration is a whole pass. The last batch is short: ranks divide
    what is left, and where it is fewer images than ranks, some have a batch less. So let no rank wait for others within the loop,
    as DistributedDataParallel's forward pass does: call its `module`.

    An image that cannot be decoded is named in a warning. It keeps its place and has the label IGNORED_LABEL: it counts as wrong
    in `(answers == labels).sum() / loader.images`, while cross_entropy leaves it out.
    """

    scale: int = 256
    """Shorter side after the rescale in pixels, at least `crop`."""

    _split = "val"

    def __post_init__(self) -> None:
        _check(0 < self.crop <= self.scale, f"scale {self.scale}: must not be below crop {self.crop}")
        super().__post_init__()
        self._plan = ValidationPlan(table=self._table, crop=self.crop, scale=self.scale, mean_rgb=self.mean_rgb)

    @property
    def left_out(self) -> int:
        """Validation images that could not be decoded when the data set was scanned, verified or prepared: in no batch, and not
        in `images`; the trainer counts them as wrong."""
        return self._manifest.val_lost

    def __len__(self) -> int:
        """Batches of this rank in a pass."""
        full, rest = divmod(self.images, self.batch_size)
        return full + (rest > self.rank)

    def __iter__(self) -> Iterator[Batch]:
        return open_loader(
            self._plan,
            self._batches_after,
            self._options,
            lost=self._lost,
            batch_size=self._share,
            fetch=fetch_ahead(self._plan, threads=None, batches_ahead=_READ_AHEAD),
        )

    def _batches_after(self, skip: int) -> Iterator[Samples]:
        for first in itertools.islice(range(0, self.images, self.batch_size), skip, len(self)):
            rows = np.arange(first, min(first + self.batch_size, self.images))
            samples = self._plan.samples(np.array_split(rows, self.world_size)[self.rank])
            labels = np.where(samples.labels == LOST_LABEL, IGNORED_LABEL, samples.labels)
            yield samples._replace(labels=labels)


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
