"""A data set of photographs where there is none: pieces of scikit-learn's two, in varied sizes, as JPEG files."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError

_LEAST_SHARE = 0.6  # of the photograph's sides that a piece has
_SHORTER_PX, _LONGER_PX = (300, 400), (420, 520)  # ImageNet's are 375 and 500 most often
_QUALITY = (85, 96)


def photograph_folder(folder: Path, *, train: int = 2048, val: int = 128) -> Path:
    """The folder, with train/<class>/*.jpg and val/<class>/*.jpg, one class for each photograph; made if it is not there.

    Raises UserError: scikit-learn is not installed, or the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError("photographs are made from scikit-learn's, which is not installed; give --data DIR") from error
    originals = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        for split, count in (("train", train), ("val", val)):
            for number in range(count):
                place = unfinished / split / f"class{number % 2}"
                place.mkdir(parents=True, exist_ok=True)
                quality = int(generator.integers(*_QUALITY))
                _piece(originals[number % 2], generator).save(place / f"{number:05}.jpg", "JPEG", quality=quality)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    except OSError as error:
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
