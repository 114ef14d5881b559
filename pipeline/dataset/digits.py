"""The built-in data set: scikit-learn's 1797 handwritten digits, written as JPEG files in class folders.

So the demo and the tests go the whole way that ImageNet goes: files, manifest, plan, DALI.
"""

import os
import shutil
import tempfile
from pathlib import Path

from common.errors import UserError
from common.files import cache_folder

DIGITS = "digits"
"""What --data calls it."""
SIDE_PX = 36
"""The images' side: the 8×8 originals enlarged, so that crops of 32 pixels have four pixels of play."""
_VALIDATION_IMAGES = 360
_FOLDER = "digits-v1"  # a new number whenever what is written changes


def digits_folder() -> Path:
    """The folder of the data set, in the user's cache; written at the first call (1437 train and 360 val images).

    Raises UserError where the cache folder cannot be written.
    """
    folder = cache_folder() / _FOLDER
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{_FOLDER}."))
    except OSError as error:
        raise UserError(
            f"cannot write the digits data set to {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    write_digits(temporary)
    os.chmod(temporary, 0o755)
    try:
        os.rename(temporary, folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary)
    return folder


def write_digits(folder: Path) -> None:
    """Write train/<digit>/*.jpg and val/<digit>/*.jpg: a fixed stratified split, the originals' order in the names."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    splits = train_test_split(
        range(len(digits.target)), test_size=_VALIDATION_IMAGES, stratify=digits.target, random_state=0
    )
    for split, indices in zip(("train", "val"), splits, strict=True):
        for label in set(digits.target):
            (folder / split / str(label)).mkdir(parents=True)
        for index in indices:
            grey = (255 - digits.images[index] * (255 / 16)).round().astype("uint8")
            image = Image.fromarray(grey).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).convert("RGB")
            image.save(folder / split / str(digits.target[index]) / f"{index:04d}.jpg", quality=95)
