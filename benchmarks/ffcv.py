"""ffcv as a peer in a comparison of image loaders on the CPU."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder

from common.process import usable_cores
from engine.data import TrainingData

_LONGER_SIDE = {"jpg": 500, "raw": 341}
"""By the way that images are written: 500 is of ffcv's recipe; with 341, most have a shorter side of 256, as ours have."""
_JPEG_QUALITY = 90
_LEAST_IMAGES_IN_FILE = 2_000
_LEAST_IMAGES_IN_EPOCH = 100_000


def ffcv_loader(folder: Path, file: Path, data: TrainingData, write_mode: str) -> Iterator[tuple]:
    """ffcv on the CPU, by the recipe of its authors' ImageNet training, with every image kept in one way; endless batches.

    folder: with <class>/<image>. data: whose crops, batches and threads it takes, of those as many as there are cores at most.
    write_mode: "jpg", every image a JPEG; "raw", every image smaller, and its pixels as they are.
    The file, which is written first, is that of write_imagenet.py in https://github.com/libffcv/ffcv-imagenet but for the
    write_mode, which is a mixture there. The pipeline is that of train_imagenet.py there: decode the whole image, random crop of
    8 to 100 % of its area resized to crop × crop, random flip, mean and deviation; but float32, and normalised before ToTensor,
    which is where that runs on a CPU. The order is random; the file is read through the page cache. Each image is in the file as
    often as brings it to 2000 images, and an epoch goes over the file often enough for 100,000, because ffcv allocates and
    fills all its buffers anew in each.

    A batch is (images, labels): images [batch, 3, crop, crop], float32, channels_last in memory; labels int64. Both are views
    into ffcv's ring of buffers: the next batch asked for may overwrite them. The first takes long: numba compiles the pipeline.
    Raises ImportError, at the call: ffcv is not installed.
    """
    threads, crop = torch.get_num_threads(), data.config.crop
    try:
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

        # ffcv's writer forks, and this process may hold threads of other loaders, with which a fork is not safe.
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(folder, file, write_mode))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing {file} for ffcv failed: exit status {writer.exitcode}")
        images = len(ImageFolder(folder))
        images *= _copies(images)
        mean, deviation = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
        of_images = [RandomResizedCropRGBImageDecoder((crop, crop)), RandomHorizontalFlip()]
        of_images += [NormalizeImage(mean, deviation, np.float32), ToTensor(), ToTorchImage()]
        loader = Loader(
            str(file),
            batch_size=data.micro_batch,
            num_workers=min(data.threads, usable_cores()),  # it allows no more
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


def _copies(images: int) -> int:
    return -(-_LEAST_IMAGES_IN_FILE // images)


def _write(folder: Path, file: Path, write_mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    photographs = ImageFolder(folder)
    image = RGBImageField(write_mode, max_resolution=_LONGER_SIDE[write_mode], jpeg_quality=_JPEG_QUALITY)
    writer = DatasetWriter(str(file), {"image": image, "label": IntField()}, num_workers=usable_cores())
    writer.from_indexed_dataset(photographs, indices=np.tile(np.arange(len(photographs)), _copies(len(photographs))))
