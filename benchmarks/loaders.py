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
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader, RandomSampler

from benchmarks import flag_parser, program
from benchmarks.ffcv import ffcv_loader
from benchmarks.plain import COLOUR_SHIFT_SIGMA, ListedImages, read_pil, training_transform
from benchmarks.turns import OURS, add_turn_flags, compare_streams
from common.errors import UserError
from common.memory import share_one_heap
from common.process import end, usable_cores
from common.progress import say
from common.ranks import Ranks, ranks_of_this_run
from engine.config import Config, parse_args
from engine.data import open_training_data
from engine.precision import choose_precision
from pipeline.dataset.manifest import Manifest, open_manifest
from pipeline.plan.samples import IMAGENET_MEAN_RGB
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT
from pipeline.preparation.packing import Settings, prepare

PREPARED = "this project, prepared"
_SCALES = {"S=256": "256", "S in [256;512]": "256-512"}
"""As train.py's --train-scale has them."""
_PREFETCH = 2
_PAUSE_SECONDS = 4.0

Files = tuple[list[str], list[int]]
"""Paths and labels."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("loaders", "Compare image loaders: images per second.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where DALI's loaders decode")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a batch")
    parser.add_argument("--crop", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument(
        "--threads",
        type=int,
        default=usable_cores() + 1,
        help="threads or worker processes of each loader (%(default)s: one more than there are cores, since some wait)",
    )
    add_turn_flags(parser)
    arguments = parser.parse_args(argv)
    share_one_heap()  # as train.py does
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; check the driver with nvidia-smi, or use --device cpu")
    with ranks_of_this_run(arguments.device) as ranks, tempfile.TemporaryDirectory() as work:
        manifest = open_manifest(arguments.data)
        scales = {
            name: compare_streams(
                name,
                make_loaders(manifest, scale, arguments, ranks, Path(work)),
                times=(OURS, PREPARED),
                images=arguments.batch_size,
                rounds=arguments.rounds,
                batches=arguments.batches,
                device=ranks.device,
                pause_seconds=_PAUSE_SECONDS,
            )
            for name, scale in _SCALES.items()
        }
    settings = {name: getattr(arguments, name) for name in ("device", "batch_size", "threads", "rounds")}
    return {"data": str(arguments.data), "images": len(manifest.train), **settings, "scales": scales}


def make_loaders(
    manifest: Manifest, scale: str, arguments: argparse.Namespace, ranks: Ranks, work: Path
) -> dict[str, Iterator]:
    """Endless iterators of batches, by name. work: a folder for what some of them read."""
    size, crop, threads = arguments.batch_size, arguments.crop, arguments.threads
    flags = f"--device {arguments.device} --train-scale {scale} --crop {crop} --batch-size {size} --threads {threads}"
    config = parse_args(["--data", str(arguments.data), "--prefetch", str(_PREFETCH), *flags.split()])
    precision = choose_precision("fp32", ranks.device)
    settings = Settings(short_side="256" if scale == "256" else "max:512", quality=90, shard_images=2048)
    packed = work / scale
    prepare(arguments.data, packed, settings, threads=threads, ranks=ranks)
    ours, prepared = (
        open_training_data(replace(config, data=str(folder)), ranks, precision).train_batches(0)
        for folder in (arguments.data, packed)
    )
    rows = manifest.train.read(np.arange(len(manifest.train)))
    files = [manifest.train.name(source) for source in rows.source], rows.labels.tolist()
    loaders = {
        OURS: ours,
        "DALI, decode all": usual_dali(files, config, ranks.device),
        "torchvision, PIL": torchvision_loader(files, read_pil, config),
        "torchvision, tensors": torchvision_loader(files, tensor_reader(), config),
        PREPARED: prepared,
    }
    if scale == "256":
        try:
            peer = ffcv_loader(*files, work / "images.beton", crop, size, min(threads, usable_cores()))  # its limit
            next(peer)  # numba compiles
            loaders["ffcv"] = peer
        except ImportError as error:
            say(f"ffcv is left out: {error}")
    return loaders


# ---- the others --------------------------------------------------------------------------------------------------


def usual_dali(files: Files, config: Config, device: torch.device) -> Iterator:
    """The graph of DALI's own examples, decode the whole image, resize, random crop and flip, with its random operators."""
    shift_of_alpha = types.Constant(np.array(IMAGENET_COLOUR_SHIFT, dtype=np.float32))
    mean = types.Constant(np.asarray(IMAGENET_MEAN_RGB, dtype=np.float32))
    (paths, labels), (low, high), on_gpu = files, map(float, config.scale), device.type == "cuda"

    @pipeline_def(
        batch_size=config.batch_size,
        num_threads=config.threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=_PREFETCH,
        seed=0,
    )
    def graph():
        encoded, label = fn.readers.file(files=paths, labels=labels, shuffle_after_epoch=True)
        whole = fn.decoders.image(encoded, output_type=types.RGB, device="mixed" if on_gpu else "cpu")
        shorter = low if low == high else fn.random.uniform(range=(low, high))
        resized = fn.resize(whole, resize_shorter=shorter)
        alpha = fn.reshape(fn.random.normal(shape=[3], stddev=COLOUR_SHIFT_SIGMA), shape=[1, 3])
        shift = fn.reductions.sum(alpha * shift_of_alpha, axes=1)
        images = fn.crop_mirror_normalize(
            resized,
            crop=(config.crop, config.crop),
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


def tensor_reader() -> Callable[[str], torch.Tensor]:
    """From a path to uint8 [3, height, width]: torchcodec's, since torchvision's is deprecated from 0.29 on."""
    try:
        from torchcodec.decoders import decode_image
    except ImportError:  # not installed, or older than 0.16, which has no image decoder
        from torchvision.io import decode_image
    return functools.partial(decode_image, mode="RGB")


def torchvision_loader(files: Files, read: Callable, config: Config) -> Iterator:
    """torchvision's transforms in as many worker processes as there are threads of the others."""
    transform = training_transform(config.scale, config.crop, IMAGENET_MEAN_RGB, IMAGENET_COLOUR_SHIFT)
    images = ListedImages(*files, lambda path: transform(read(path)))
    # One permutation after the other: no epoch's end interrupts the clock.
    order = RandomSampler(images, num_samples=sys.maxsize, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        images,
        batch_size=config.batch_size,
        sampler=order,
        num_workers=config.threads or 0,
        prefetch_factor=_PREFETCH,
        multiprocessing_context="fork",
    )
    return iter(loader)


if __name__ == "__main__":
    end(main)
