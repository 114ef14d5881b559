"""python -m benchmarks.loaders --data DIR: this project's loader against the usual ones, in one run on one machine.

DIR holds train/<class>/*.JPEG and val/<class>/*. All loaders get the same files, batch size and cores, and make the paper's
sample: shorter side rescaled to S, random 224×224 crop, random flip, random colour shift, mean subtracted, float32. Ours
leaves them in channels_last, as the network wants them; the others are not charged for that. Ours is also measured on DIR as
pipeline.prepare packs it: at S = 256 with a shorter side of 256 pixels, else with a longer side of at most 512. At S = 256
ffcv joins, where it is installed, with its authors' ImageNet recipe (500 pixels, JPEG quality 90; its own random crops, no
colour shift). "tensors" are decoded by torchcodec where it is installed, else by torchvision, which gives that up.

With --device cuda, DALI's loaders decode on the GPU and leave the images there, ours and the usual one; torchvision's and
ffcv stay on the CPU, and are not charged for the copy.

They take turns (benchmarks/turns.py). A turn begins with a pause, in which the one before fills its queues and falls silent
(torchvision's three workers work on up to six batches), and with batches that are not counted, until what was prefetched
meanwhile is used up.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.ffcv import ffcv_loader
from benchmarks.plain import COLOUR_SHIFT_SIGMA, training_transform
from benchmarks.turns import OURS, add_turn_flags, print_table, rates_of_streams, summarise
from common.errors import UserError
from common.flags import FlagParser
from common.heap import share_one_heap
from common.process import end, run_program, usable_cores
from common.progress import say
from common.ranks import ranks_of_this_run
from pipeline.loader import DaliLoader
from pipeline.manifest import open_manifest
from pipeline.plan import IMAGENET_COLOUR_SHIFT, IMAGENET_MEAN_RGB, TrainPlan
from pipeline.prepare import Settings, prepare
from pipeline.prepared import open_prepared
from pipeline.reader import Fetch, ShardReader
from pipeline.tables import FileTable

PREPARED = "this project, prepared"
_SCALES = {"S=256": (256, 256), "S in [256;512]": (256, 512)}
_PREFETCH = 2
_PAUSE_SECONDS = 4.0


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = FlagParser(prog="python -m benchmarks.loaders", description="Compare image loaders: images per second.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where DALI's loaders decode")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a batch")
    parser.add_argument("--crop", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument(
        "--threads",
        type=int,
        default=usable_cores() + 1,
        help="threads or worker processes of each loader: one more than there are cores, since each waits now and then",
    )
    add_turn_flags(parser)
    arguments = parser.parse_args(argv)
    share_one_heap()  # as train.py does
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; check the driver with nvidia-smi, or use --device cpu")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    table = open_manifest(arguments.data).train
    scales = {}
    with tempfile.TemporaryDirectory() as work:
        for name, scale in _SCALES.items():
            rates = rates_of_streams(
                make_loaders(table, scale, arguments, device, Path(work)),
                images=arguments.batch_size,
                rounds=arguments.rounds,
                batches=arguments.batches,
                device=device,
                pause_seconds=_PAUSE_SECONDS,
            )
            scales[name] = summarise(rates, times=(OURS, PREPARED))
            print_table(name, scales[name])
    settings = {name: getattr(arguments, name) for name in ("device", "batch_size", "threads", "rounds")}
    print(json.dumps({"data": str(arguments.data), "images": len(table), **settings, "scales": scales}))
    return 0


def make_loaders(
    table: FileTable, scale: tuple[int, int], arguments: argparse.Namespace, device: torch.device, work: Path
) -> dict[str, Iterator]:
    """Endless iterators of batches, by name. work: a folder for what some of them read."""
    size, crop, threads = arguments.batch_size, arguments.crop, arguments.threads
    plan = TrainPlan(table=table, batch_size=size, crop=crop, scale=scale, seed=0)
    rows = table.read(np.arange(len(table)))
    paths = [table.name(source) for source in rows.source]
    labels = rows.labels.tolist()
    loaders = {
        OURS: our_loader(plan, device, threads, fetch=None),
        "DALI, decode all": usual_dali(paths, labels, scale, crop, size, device, threads),
        "torchvision, PIL": torchvision_loader(paths, labels, read_pil, scale, crop, size, threads),
        "torchvision, tensors": torchvision_loader(paths, labels, tensor_reader(), scale, crop, size, threads),
        PREPARED: our_prepared_loader(arguments, scale, device, work),
    }
    if scale[0] == scale[1]:
        try:
            peer = ffcv_loader(
                paths, labels, work / "images.beton", crop, size, min(threads, usable_cores())
            )  # its limit
            next(peer)  # numba compiles
            loaders["ffcv"] = peer
        except ImportError as error:
            say(f"ffcv is left out: {error}")
    return loaders


def our_loader(plan: TrainPlan, device: torch.device, threads: int, fetch: Fetch | None) -> DaliLoader:
    return DaliLoader(
        lambda skip: plan.batches(start=0, rank=0, world_size=1, micro_batch=plan.batch_size, skip=skip),
        lose=lambda samples, dead, reasons: plan.lose(samples, dead),
        batch_size=plan.batch_size,
        crop=plan.crop,
        device=device,
        decoder="gpu" if device.type == "cuda" else "cpu",
        half=False,
        threads=threads,
        prefetch=_PREFETCH,
        fetch=fetch,
    )


def our_prepared_loader(
    arguments: argparse.Namespace, scale: tuple[int, int], device: torch.device, work: Path
) -> DaliLoader:
    settings = Settings(short_side="256" if scale == (256, 256) else "max:512", quality=90, shard_images=2048)
    folder = work / settings.short_side.replace(":", "-")
    with ranks_of_this_run("cpu") as ranks:
        prepare(arguments.data, folder, settings, threads=arguments.threads, ranks=ranks)
    table = open_prepared(str(folder)).train
    plan = TrainPlan(table=table, batch_size=arguments.batch_size, crop=arguments.crop, scale=scale, seed=0)
    reader = ShardReader(table, threads=None, batches_ahead=8)
    return our_loader(plan, device, arguments.threads, fetch=lambda batches: reader.fetch(batches, plan.read_group))


# ---- the others --------------------------------------------------------------------------------------------------


def usual_dali(
    paths: list[str], labels: list[int], scale, crop: int, batch_size: int, device: torch.device, threads: int
) -> Iterator:
    """The graph of DALI's own examples, decode the whole image, resize, random crop and flip, with its random operators."""
    shift_of_alpha = types.Constant(np.array(IMAGENET_COLOUR_SHIFT, dtype=np.float32))
    mean = types.Constant(np.asarray(IMAGENET_MEAN_RGB, dtype=np.float32))
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=_PREFETCH,
        seed=0,
    )
    def graph():
        encoded, label = fn.readers.file(files=paths, labels=labels, shuffle_after_epoch=True)
        whole = fn.decoders.image(encoded, output_type=types.RGB, device="mixed" if on_gpu else "cpu")
        shorter = float(scale[0]) if scale[0] == scale[1] else fn.random.uniform(range=tuple(map(float, scale)))
        resized = fn.resize(whole, resize_shorter=shorter)
        alpha = fn.reshape(fn.random.normal(shape=[3], stddev=COLOUR_SHIFT_SIGMA), shape=[1, 3])
        shift = fn.reductions.sum(alpha * shift_of_alpha, axes=1)
        images = fn.crop_mirror_normalize(
            resized,
            crop=(crop, crop),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
            mean=mean - shift,
            std=[1.0] * 3,
            output_layout="HWC",
            dtype=types.FLOAT,
        )
        return images, label

    pipeline = graph()
    while True:
        images, label = pipeline.run(torch.cuda.current_stream(device)) if on_gpu else pipeline.run()
        yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), torch.from_dlpack(label.as_tensor())


def read_pil(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def tensor_reader() -> Callable[[str], torch.Tensor]:
    """From a path to uint8 [3, height, width]: torchcodec's, since torchvision's is deprecated from 0.29 on."""
    try:
        from torchcodec.decoders import decode_image
    except ImportError:  # not installed, or older than 0.16, which has no image decoder
        from torchvision.io import decode_image
    return functools.partial(decode_image, mode="RGB")


class Images(Dataset):
    """What torchvision's ImageFolder does, over a given list."""

    def __init__(self, paths: list[str], labels: list[int], read: Callable, transform: Callable) -> None:
        self._paths, self._labels, self._read, self._transform = paths, labels, read, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int):
        return self._transform(self._read(self._paths[index])), self._labels[index]


class EndlessShuffle(Sampler):
    """One permutation after the other, so that no epoch's end interrupts the clock."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(self._length, generator=generator).tolist()


def torchvision_loader(
    paths: list[str], labels: list[int], read: Callable, scale, crop: int, batch_size: int, workers: int
) -> Iterator:
    """torchvision's transforms in as many worker processes as there are cores."""
    loader = DataLoader(
        Images(paths, labels, read, training_transform(scale, crop, IMAGENET_MEAN_RGB, IMAGENET_COLOUR_SHIFT)),
        batch_size=batch_size,
        sampler=EndlessShuffle(len(paths)),
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        multiprocessing_context="fork",
    )
    return iter(loader)


if __name__ == "__main__":
    end(main)
