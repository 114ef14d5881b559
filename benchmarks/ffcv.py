"""ffcv as a peer in a comparison of image loaders on the CPU."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.plain import ListedImages, read_pil
from common.process import usable_cores

_LONGER_SIDE = 500
_JPEG_QUALITY = 90
_LEAST_IMAGES_IN_FILE = 2_000
_LEAST_IMAGES_IN_EPOCH = 100_000


def ffcv_loader(
    paths: list[str], labels: list[int], file: Path, crop: int, batch_size: int, workers: int
) -> Iterator[tuple]:
    """ffcv on the CPU, by the recipe of its authors' ImageNet training, with every image kept as a JPEG; endless batches.

    The file, which is written first, is that of write_imagenet.py in https://github.com/libffcv/ffcv-imagenet, but that no
    image is kept as raw pixels. The pipeline is that of train_imagenet.py there: decode the whole image, random crop of 8 to
    100 % of its area resized to crop × crop, random flip, mean and deviation; but float32, and normalised before ToTensor, which
    is where that runs on a CPU. The order is random; the file is read through the page cache. Each image is in the file as
    often as brings it to 2000 images, and an epoch goes over the file often enough for 100,000, because ffcv allocates and
    fills all its buffers anew in each.

    A batch is (images, labels): images [batch, 3, crop, crop], float32, channels_last in memory; labels int64. Both are views
    into ffcv's ring of buffers: the next batch asked for may overwrite them. The first takes long: numba compiles the pipeline.
    Raises ImportError, at the call: ffcv is not installed.
    """
    threads = torch.get_num_threads()
    try:
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

        # ffcv's writer forks, and this process may hold threads of other loaders, with which a fork is not safe.
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(paths, labels, file))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing {file} for ffcv failed: exit status {writer.exitcode}")
        images = len(paths) * _copies(paths)
        mean, deviation = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
        of_images = [RandomResizedCropRGBImageDecoder((crop, crop)), RandomHorizontalFlip()]
        of_images += [NormalizeImage(mean, deviation, np.float32), ToTensor(), ToTorchImage()]
        loader = Loader(
            str(file),
            batch_size=batch_size,
            num_workers=workers,
            os_cache=True,
            order=OrderOption.RANDOM,
            seed=0,
            indices=np.tile(np.arange(images, dtype=np.uint64), -(-_LEAST_IMAGES_IN_EPOCH // images)),
            drop_last=True,
            pipelines={"image": of_images, "label": [IntDecoder(), ToTensor(), Squeeze()]},
        )
    finally:
        torch.set_num_threads(threads)  # importing ffcv sets it to 1 for the whole process
    return _batches(loader)


def _batches(loader) -> Iterator[tuple]:
    while True:
        epoch = iter(loader)
        try:
            yield from epoch
        finally:
            epoch.close()  # ends its thread, which would otherwise wait for ever with a full queue


def _copies(paths: list[str]) -> int:
    return -(-_LEAST_IMAGES_IN_FILE // len(paths))


def _write(paths: list[str], labels: list[int], file: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=_LONGER_SIDE, jpeg_quality=_JPEG_QUALITY)
    writer = DatasetWriter(str(file), {"image": image, "label": IntField()}, num_workers=usable_cores())
    writer.from_indexed_dataset(
        ListedImages(paths, labels, read_pil), indices=np.tile(np.arange(len(paths)), _copies(paths))
    )
