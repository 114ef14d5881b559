"""Image files and data folders that tests make for themselves."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs() -> list[Image.Image]:
    """Two real photographs of 427×640 pixels, from scikit-learn."""
    return [Image.fromarray(array) for array in load_sample_images().images]


def photo_folder(root: Path, *, train: int = 6, val: int = 3, classes: int = 2, seed: int = 0) -> Path:
    """A data folder of photographs cut and scaled to various sizes, among them grey, CMYK and EXIF-rotated JPEGs."""
    generator = np.random.default_rng(seed)
    sources = photographs()
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            folder = root / split / f"class{number % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            width, height = (int(side) for side in generator.integers(180, 700, size=2))
            image = sources[number % 2].resize((width, height), Image.Resampling.LANCZOS)
            save_variant(image, folder / f"{number:03d}.JPEG", variant=number % 5)
    return root


def save_variant(image: Image.Image, path: Path, *, variant: int) -> None:
    """0, 1: plain; 2: grey; 3: CMYK; 4: with an EXIF orientation that asks for a rotation by 90 degrees."""
    if variant == 2:
        image.convert("L").save(path, "JPEG", quality=92)
    elif variant == 3:
        image.convert("CMYK").save(path, "JPEG", quality=92)
    elif variant == 4:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, "JPEG", quality=92, exif=exif)
    else:
        image.save(path, "JPEG", quality=92)
