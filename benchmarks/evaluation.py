"""python -m benchmarks.evaluation [--data DIR]: what batching by size and a single decode are worth in evaluate.py.

dense: a network's pass over whole images, batched by their size against one at a time. multicrop: the 25 crops of the grid cut
from one decoded image, against as many windows that are each decoded; without the network, whose work is the same in both. The
two of a pair take turns (benchmarks/turns.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import flag_parser, program
from benchmarks.photographs import check_photographs, photograph_folder
from benchmarks.turns import OURS, compare_calls
from common.files import cache_folder
from common.flags import whole_above_zero
from common.memory import share_one_heap
from common.process import end, usable_cores
from common.ranks import ranks_of_this_run
from engine.config import parse_args
from engine.data import TrainingData, open_training_data
from engine.evaluation.protocols import GRID, grid_crops, mean_over_views, whole_image
from engine.evaluation.trials import posteriors_of
from engine.precision import choose_precision
from engine.training.assembly import network_of
from model.dense import Dense
from pipeline.dataset.manifest import Manifest
from pipeline.plan.samples import Samples

_DEFAULT_FLAGS = ["--arch", "A", "--crop", "224", "--batch-size", "128", "--device", "cpu"]


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("evaluation", "Compare ways of evaluating: images/s. Other flags are train.py's.")
    parser.add_argument("--data", type=Path, help="folder with train/ and val/ (default: made from two photographs)")
    parser.add_argument(
        "--dense-crop", type=whole_above_zero, default=32, help="crop of the dense pass in pixels; --crop: the other's"
    )
    parser.add_argument("--rounds", type=whole_above_zero, default=5, help="turns of each")
    share_one_heap()  # as evaluate.py does
    options, flags = parser.parse_known_args(argv)
    folder = options.data or photograph_folder(cache_folder() / "photographs-val-96", train=2, val=96)
    config = parse_args([*_DEFAULT_FLAGS, *flags, "--data", str(folder)])
    check_photographs(config)
    results = {}
    with ranks_of_this_run(config.device) as ranks:
        data = open_training_data(config, ranks, choose_precision(config.precision, ranks))
        passes = {
            "dense": dense_passes(at_scale(data, options.dense_crop)),
            "multicrop": crop_passes(at_scale(data, config.crop)),
        }
        for name, both in passes.items():
            for run in both.values():
                run()  # warms up
            results[name] = compare_calls(
                name,
                both,
                times=(OURS,),
                images=data.val_images,
                rounds=options.rounds,
                batches=1,  # is a whole pass
                not_counted=0,
                device=ranks.device,
            )
    settings = {"images": data.val_images, "cores": usable_cores(), "device": config.device}
    return {**settings, "arch": config.arch, "rounds": options.rounds, **results}


def dense_passes(data: TrainingData) -> dict[str, Callable[[], object]]:
    """A dense pass with flips over all images: batched by size, and one image at a time."""
    crop = data.config.crop
    model = network_of(data.config, classes=1000, device=data.ranks.device).eval()
    compute = posteriors_of(Dense(model), data.precision)

    def run(batch_size: int) -> None:
        viewing = replace(data.viewing, batch_size=batch_size)
        for images, _ in data.whole_batches(viewing, "val")[0]:
            mean_over_views(compute, whole_image(images, crop), flip=True, pixels=viewing.pixels).cpu()

    return {OURS: lambda: run(data.micro_batch), "one by one": lambda: run(1)}


def crop_passes(data: TrainingData) -> dict[str, Callable[[], object]]:
    """The crops of all images on the device: cut from whole images, and as many that are each decoded by themselves.

    Those are training's, which lie anywhere; their windows are as large as the grid's.
    """
    size, crop, crops = data.micro_batch, data.config.crop, GRID**2 * data.val_images
    assert isinstance(data.manifest, Manifest)
    plan = replace(data, manifest=replace(data.manifest, train=data.manifest.val)).train_plan()

    def batches_after(skip: int) -> Iterator[Samples]:
        for first in range(skip * size, crops, size):
            yield plan.samples(np.arange(first, min(first + size, crops)))

    def cut() -> None:
        for images, _ in data.whole_batches(replace(data.viewing, batch_size=size), "val")[0]:
            for view in grid_crops(images, crop):
                view.contiguous(memory_format=torch.channels_last).sum().item()

    def decode_each() -> None:
        for images, _ in data.loader(plan, batches_after, size, "val", data.train_options):
            images.sum().item()

    return {OURS: cut, "decode each": decode_each}


def at_scale(data: TrainingData, crop: int) -> TrainingData:
    """The data set for a crop, at the paper's scale for it."""
    return replace(data, config=replace(data.config, crop=crop, train_scale=str(256 * crop // 224)))


if __name__ == "__main__":
    end(main)
