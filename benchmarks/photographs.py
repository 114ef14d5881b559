"""A folder of photographs to measure with: as one gives it, prepared, or made of scikit-learn's two where there is none."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from common.errors import UserError
from engine.config import DIGITS, SYNTHETIC, Config
from engine.data import TrainingData, open_training_data
from pipeline.preparation.packing import Settings, prepare
from pipeline.shards.index import is_prepared

_LEAST_SHARE = 0.6  # of the photograph's sides that a piece has
_SHORTER_PX, _LONGER_PX = (300, 400), (420, 520)  # ImageNet's are 375 and 500 most often
_QUALITY = (85, 96)


def check_photographs(config: Config) -> None:
    """Raises UserError: its data are no folder of images."""
    if config.data in (SYNTHETIC, DIGITS) or is_prepared(config.data):
        raise UserError(f"--data {config.data}: give a folder of photographs, with train/<class>/* and val/<class>/*")


def prepared_copy(data: TrainingData, folder: Path, *, quality: int | None = 90) -> TrainingData:
    """The same images, as pipeline.prepare packs them for the scales that they are trained at.

    folder: made for them. quality: of the JPEGs; None: they are kept as pixels.
    """
    low, high = data.config.scale
    settings = Settings(short_side=f"{low}" if low == high else f"max:{high}", quality=quality, shard_images=2048)
    prepare(Path(data.config.data), folder, settings, threads=data.threads, ranks=data.ranks)
    return open_training_data(replace(data.config, data=str(folder)), data.ranks, data.precision)


def photograph_folder(folder: Path, *, train: int = 2048, val: int = 128) -> Path:
    """The folder, with train/<class>/*.jpg and val/<class>/*.jpg, one class for each photograph; made if it is not there.

    The images are pieces of the photographs, of varied sizes.
    Raises UserError: the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    originals = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            unfinished = Path(work, folder.name)
            for split, count in (("train", train), ("val", val)):
                for number in range(count):
                    place = unfinished / split / f"class{number % 2}"
                    place.mkdir(parents=True, exist_ok=True)
                    quality = int(generator.integers(*_QUALITY))
                    _piece(originals[number % 2], generator).save(place / f"{number:05}.jpg", "JPEG", quality=quality)
            os.rename(unfinished, folder)
    except OSError as error:
        if folder.is_dir():
            return folder  # another process was faster
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give --data DIR") from error
    return folder


def _piece(original: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random part of the photograph, rescaled; upright in half of the cases."""
    share = generator.uniform(_LEAST_SHARE, 1.0)
    width, height = (int(side * share) for side in original.size)
    left, top = (int(generator.integers(most + 1)) for most in (original.width - width, original.height - height))
    longer, shorter = (int(generator.integers(*bounds)) for bounds in (_LONGER_PX, _SHORTER_PX))
    size = (shorter, longer) if generator.random() < 0.5 else (longer, shorter)
    return original.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
