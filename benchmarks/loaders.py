"""python -m benchmarks.loaders --data DIR: this project's loader against the usual ones, in one run on one machine.

DIR holds train/<class>/*.JPEG and val/<class>/*. All loaders get the same files, batch size and cores, and make the paper's
sample: shorter side rescaled to S, random 224×224 crop, random flip, random colour shift, mean subtracted, float32. Ours
leaves them in channels_last, as the network wants them; the others are not charged for that. Ours is also measured on DIR as
pipeline.prepare packs it, as JPEGs and as pixels ("raw"): at S = 256 with a shorter side of 256 pixels, else with a longer side
of at most 512. At S = 256 ffcv joins, where it is installed, with its authors' ImageNet recipe (500 pixels, JPEG quality 90; its
own random crops, no colour shift), and with smaller images that it keeps as pixels (benchmarks/ffcv.py). "tensors" are decoded
by torchcodec where it is installed, else by torchvision, which gives that up.

With --device cuda, DALI's loaders decode on the GPU and leave the images there, ours and the usual one; torchvision's and
ffcv stay on the CPU, and are not charged for the copy.

They take turns (benchmarks/turns.py). A turn begins with a pause, in which the one before fills its queues and falls silent
(torchvision's three workers work on up to six batches), and with batches that are not counted, until what was prefetched
meanwhile is used up.
"""

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from benchmarks import flag_parser, program, train_config
from benchmarks.ffcv import ffcv_loader
from benchmarks.photographs import check_photographs, prepared_copy
from benchmarks.plain import COLOUR_SHIFT_SIGMA, training_transform
from benchmarks.turns import OURS, add_turn_flags, compare_calls
from common.memory import share_one_heap
from common.process import end, usable_cores
from common.progress import say
from common.ranks import ranks_of_this_run
from engine.data import TrainingData, open_training_data
from engine.precision import choose_precision
from pipeline.plan.samples import IMAGENET_MEAN_RGB
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT

PREPARED, RAW = "this project, prepared", "this project, prepared raw"
_SCALES = {"S=256": "256", "S in [256;512]": "256-512"}
"""As train.py's --train-scale has them."""
_DEFAULT_FLAGS = ["--device", "cpu", "--batch-size", "256", "--prefetch", "2"]
_DEFAULT_FLAGS += ["--threads", str(usable_cores() + 1)]  # each waits now and then
_CHOSEN = ("--crop-mode=paper", "--precision=fp32")
_PAUSE_SECONDS = 4.0


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("loaders", "Compare image loaders: images per second. Other flags are train.py's.")
    add_turn_flags(parser)
    options, flags = parser.parse_known_args(argv)
    configs = {
        name: train_config(flags, defaults=_DEFAULT_FLAGS, chosen=[f"--train-scale={scale}", *_CHOSEN])
        for name, scale in _SCALES.items()
    }
    config = next(iter(configs.values()))
    check_photographs(config)
    share_one_heap()  # as train.py does
    scales = {}
    with ranks_of_this_run(config.device) as ranks:
        for name, at_scale in configs.items():
            data = open_training_data(at_scale, ranks, choose_precision(at_scale.precision, ranks))
            with tempfile.TemporaryDirectory() as work:
                scales[name] = compare_calls(
                    name,
                    {loader: batches.__next__ for loader, batches in make_loaders(data, Path(work)).items()},
                    times=(OURS, PREPARED, RAW),
                    images=data.micro_batch,
                    device=ranks.device,
                    pause_seconds=_PAUSE_SECONDS,
                    **vars(options),
                )
    settings = {name: getattr(config, name) for name in ("data", "device", "batch_size", "threads")}
    return {**settings, "images": data.train_images, "rounds": options.rounds, "scales": scales}


def make_loaders(data: TrainingData, work: Path) -> dict[str, Iterator]:
    """Endless iterators of batches, by name. work: a folder for what some of them read."""
    folder = Path(data.config.data, "train")
    loaders = {
        OURS: data.train_batches(0),
        "DALI, decode all": usual_dali(folder, data),
        "torchvision, PIL": torchvision_loader(folder, default_loader, data),
        "torchvision, tensors": torchvision_loader(folder, tensor_reader(), data),
        PREPARED: prepared_copy(data, work / "prepared").train_batches(0),
        RAW: prepared_copy(data, work / "raw", quality=None).train_batches(0),
    }
    if data.config.train_scale == "256":
        try:
            for name, write_mode in (("ffcv", "jpg"), ("ffcv, raw", "raw")):
                peer = ffcv_loader(folder, work / f"{write_mode}.beton", data, write_mode)
                next(peer)  # numba compiles
                loaders[name] = peer
        except ImportError as error:
            say(f"ffcv is left out: {error}")
    return loaders


# ---- the others --------------------------------------------------------------------------------------------------


def usual_dali(folder: Path, data: TrainingData) -> Iterator:
    """The graph of DALI's own examples, decode the whole image, resize, random crop and flip, with its random operators."""
    shift_of_alpha = types.Constant(np.array(IMAGENET_COLOUR_SHIFT, dtype=np.float32))
    mean = types.Constant(np.asarray(IMAGENET_MEAN_RGB, dtype=np.float32))
    crop, (low, high), device = data.config.crop, map(float, data.config.scale), data.ranks.device
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=data.micro_batch,
        num_threads=data.threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=data.config.prefetch,
        seed=0,
    )
    def graph():
        encoded, label = fn.readers.file(file_root=str(folder), shuffle_after_epoch=True)
        whole = fn.decoders.image(encoded, output_type=types.RGB, device="mixed" if on_gpu else "cpu")
        shorter = low if low == high else fn.random.uniform(range=(low, high))
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
            std=list(data.config.std_rgb),
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


def torchvision_loader(folder: Path, read: Callable, data: TrainingData) -> Iterator:
    """torchvision's transforms in as many worker processes as there are threads of the others."""
    transform = training_transform(data.config, IMAGENET_MEAN_RGB, IMAGENET_COLOUR_SHIFT)
    images = ImageFolder(folder, transform, loader=read)
    # One permutation after the other: no epoch's end interrupts the clock.
    order = RandomSampler(images, num_samples=sys.maxsize, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        images,
        batch_size=data.micro_batch,
        sampler=order,
        num_workers=data.threads,
        prefetch_factor=data.config.prefetch,
        multiprocessing_context="fork",
    )
    return iter(loader)


if __name__ == "__main__":
    end(main)
