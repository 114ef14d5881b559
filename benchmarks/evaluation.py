"""python -m benchmarks.evaluation [--data DIR]: what batching by size and a single decode are worth in evaluate.py.

dense: a network's pass over whole images, batched by their size against one at a time. multicrop: the 25 crops of the grid cut
from one decoded image, against a decode of each crop's window; without the network, whose work is the same in both. The two of
a pair take turns (benchmarks/turns.py).
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks import flag_parser, program
from benchmarks.photographs import photograph_folder
from benchmarks.turns import OURS, print_table, summarise, take_turns
from common.errors import UserError
from common.files import cache_folder
from common.memory import share_one_heap
from common.process import end, usable_cores
from common.ranks import ranks_of_this_run
from engine.config import LoadingFlags
from engine.data import Data, Viewing, open_data
from engine.evaluation.evaluator import posteriors_of
from engine.evaluation.protocols import grid_corners, grid_crops, mean_over_views, whole_image
from engine.precision import choose_precision
from model.dense import Dense
from model.vgg import build
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.plan.samples import IMAGENET_MEAN_RGB, Samples, rescaled_sizes, source_windows
from pipeline.shards.index import is_prepared


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("evaluation", "Compare ways of evaluating: images/s.")
    parser.add_argument("--data", type=Path, help="folder with train/ and val/ (default: made from two photographs)")
    parser.add_argument("--arch", default="A", help="network of the dense pass")
    parser.add_argument("--dense-crop", type=int, default=32, help="crop of the dense pass in pixels")
    parser.add_argument("--crop", type=int, default=224, help="side of the multi-crop evaluation's crops in pixels")
    parser.add_argument("--batch-size", type=int, default=128, help="images of the crop's size in a batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    share_one_heap()  # as evaluate.py does
    arguments = parser.parse_args(argv)
    if arguments.data and is_prepared(str(arguments.data)):
        raise UserError(f"--data {arguments.data}: is prepared; give the folder of images that it was made from")
    folder = arguments.data or photograph_folder(cache_folder() / "photographs-val-96", train=2, val=96)
    with ranks_of_this_run(arguments.device) as ranks:
        precision = choose_precision("auto", ranks.device)
        data = open_data(str(folder), ranks, precision, LoadingFlags(), max_bad_images=None)
        passes = {"dense": dense_passes(data, arguments), "multicrop": crop_passes(data, arguments)}
        results = {name: compare(both, arguments.rounds, data.val_images) for name, both in passes.items()}
    for name, rows in results.items():
        print_table(name, rows)
    settings = {"images": data.val_images, "cores": usable_cores(), "device": arguments.device}
    return {**settings, "arch": arguments.arch, "rounds": arguments.rounds, **results}


def compare(passes: dict[str, Callable[[], object]], rounds: int, images: int) -> dict[str, dict]:
    """Measure whole passes over so many images; the first of each warms up."""

    def rate(run: Callable[[], object]) -> float:
        began = perf_counter()
        run()
        return images / (perf_counter() - began)

    turns = {name: functools.partial(rate, run) for name, run in passes.items()}
    return summarise(take_turns(turns, rounds=rounds, warm_up=1), times=(OURS,))


def dense_passes(data: Data, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A dense pass with flips over all images: batched by size, and one image at a time."""
    crop, device = arguments.dense_crop, data.ranks.device
    model = build(arguments.arch, classes=1000, crop=crop, dropout=0.5, init="xavier", device=device).eval()
    compute = posteriors_of(Dense(model), data.precision)

    def run(batch_size: int) -> None:
        viewing = viewing_at(crop, batch_size)
        for images, _ in data.whole_batches(viewing, "val")[0]:
            mean_over_views(compute, whole_image(images, crop), flip=True, pixels=viewing.pixels).cpu()

    return {OURS: lambda: run(arguments.batch_size), "one by one": lambda: run(1)}


def crop_passes(data: Data, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The crops of all images on the device: cut from whole images, and each decoded by itself."""
    crop = arguments.crop
    viewing = viewing_at(crop, arguments.batch_size)

    def cut() -> None:
        for images, _ in data.whole_batches(viewing, "val")[0]:
            for view in grid_crops(images, crop):
                view.contiguous(memory_format=torch.channels_last).sum().item()

    def decode_each() -> None:
        for images, _ in each_crop(data, viewing):
            images.sum().item()

    return {OURS: cut, "decode each": decode_each}


def each_crop(data: Data, viewing: Viewing) -> DaliLoader:
    """Every crop of every image as a sample of its own, of which the window alone is decoded, as training does."""
    assert data.manifest
    crop, batch_size = viewing.crop, viewing.batch_size
    table, folder = data.manifest.val, data.manifest.root
    source, labels, sizes = table.read(np.arange(len(table)))
    rescaled = rescaled_sizes(sizes, np.full(len(table), viewing.scale))
    corners = [list(itertools.product(*(grid_corners(side, crop) for side in size))) for size in rescaled.tolist()]
    rows = np.repeat(np.arange(len(table)), len(corners[0]))
    flipped = np.zeros(len(rows), dtype=bool)
    samples = Samples(
        source=source[rows],
        **source_windows(sizes[rows], rescaled[rows], np.concatenate(corners), crop, flipped),
        mean=np.tile(np.asarray(viewing.mean_rgb, dtype=np.float32), (len(rows), 1)),
        labels=labels[rows],
        numbers=rows,
        rows=rows,
    )

    def batches(skip: int) -> Iterator[Samples]:
        for first in range(skip * batch_size, len(rows), batch_size):
            yield samples.take(slice(first, first + batch_size))

    def lose(*_) -> None:
        raise UserError(
            f"an image cannot be decoded; have python -m pipeline.manifest {folder} --verify decode leave it out"
        )

    return DaliLoader(
        batches,
        GraphOptions(
            crop=crop,
            device_id=data.ranks.device.index,
            decoder=data.decoder,
            half=data.precision.half_images,
            threads=data.threads,
        ),
        lose=lose,
        batch_size=batch_size,
    )


def viewing_at(crop: int, batch_size: int) -> Viewing:
    """For a crop, at the paper's scale for it."""
    return Viewing(crop=crop, scale=256 * crop // 224, mean_rgb=IMAGENET_MEAN_RGB, batch_size=batch_size)


if __name__ == "__main__":
    end(main)
