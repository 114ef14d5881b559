"""python -m pipeline.imagenet TARS DATA: unpack ImageNet's official tar files into DATA/train/<class>/* and DATA/val/<class>/*.

TARS holds the three files as image-net.org gives them to registered users:

    ILSVRC2012_img_train.tar         a tar file for each class, named by its WordNet id
    ILSVRC2012_img_val.tar           50,000 images side by side
    ILSVRC2012_devkit_t12.tar.gz     which class each of these belongs to

A class folder takes its name when it is complete and on the disk: interrupted, the same command goes on with what is missing.
The tar files stay, and no copies of them are made: DATA needs 150 GB.
"""

import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from common.errors import UserError
from common.flags import FlagParser
from common.lock import FolderLock
from common.process import run_program
from common.progress import printable, say, track

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"

_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_WORDNET_ID = r"n\d{8}"
_MOST_DEVKIT_BYTES = 64 << 20  # of a file in it: a hundredth of that is usual
_THREADS = 8  # they wait for the disk most of the time


class Classes(NamedTuple):
    """What the development kit says."""

    wordnet_ids: dict[int, str]
    """ILSVRC2012_ID → WordNet id, of the classes that images belong to (not of the groups above them)."""
    val_ids: list[int]
    """The ILSVRC2012_ID of each validation image, in the order of their names."""


def unpack(tars: Path, data: Path) -> dict[str, int]:
    """Unpack the three tar files in the folder `tars` into `data`. Returns the number of images in each split.

    Raises UserError: a file is missing, is no such tar file or is cut short, holds what ImageNet's does not, `data` cannot be
    written, or others are unpacking into it.
    """
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT_TAR):
        if not (tars / name).is_file():
            raise UserError(f"{tars / name}: no such file; download it from image-net.org into {tars}")
    try:
        classes = read_devkit(tars / DEVKIT_TAR)
        folders = {"train": _train_folders(tars / TRAIN_TAR, classes), "val": _val_folders(tars / VAL_TAR, classes)}
        data.mkdir(parents=True, exist_ok=True)
        with FolderLock(data) as lock:
            lock.take()
            for split, of_split in folders.items():
                _unpack_split(data / split, of_split)
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError) as error:
        what = printable(" ".join(str(error).split()))
        raise UserError(f"{tars}: a tar file in it is damaged or cut short ({what}); download it anew") from error
    except OSError as error:
        raise UserError(f"{printable(str(error.filename or data))}: {error.strerror or error}") from error
    return {split: sum(1 for _ in (data / split).glob("*/*")) for split in ("train", "val")}


def read_devkit(path: Path) -> Classes:
    """Read ImageNet's development kit. Raises UserError where it is another one; OSError, tarfile.TarError, EOFError."""
    import scipy.io

    try:
        with tarfile.open(path) as tar:
            meta, truth = (_content(tar, name) for name in (_META, _GROUND_TRUTH))
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Only synsets without children have images; the others are groups of them.
        rows = [synset for synset in synsets if int(synset["num_children"]) == 0]
        classes = Classes(
            wordnet_ids={int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows},
            val_ids=[int(line) for line in truth.split()],
        )
        names = list(classes.wordnet_ids.values())
        if wrong := [name for name in names if not re.fullmatch(_WORDNET_ID, name)]:
            raise ValueError(f"{printable(wrong[0])} is no WordNet id")
        if len(set(names)) < len(rows):
            raise ValueError("two classes with one number or one WordNet id")
        if unknown := set(classes.val_ids) - set(classes.wordnet_ids):
            raise ValueError(f"the ground truth names a class {min(unknown)}, which does not exist")
    except (OSError, tarfile.TarError, EOFError):
        raise
    except Exception as error:  # SciPy has many, for a file that is not MATLAB's
        raise UserError(f"{path}: not ImageNet's development kit of 2012 ({error}); download it anew") from error
    return classes


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.getmember(name)  # KeyError: no such member
    file = tar.extractfile(member) if member.isreg() else None
    if file is None or member.size > _MOST_DEVKIT_BYTES:
        raise ValueError(f"{name} is not a file of its size")
    return file.read()


# A class folder: its name, and what yields its images' names and contents.
_Folder = tuple[str, Callable[[], Iterator[tuple[str, BinaryIO]]]]


def _train_folders(path: Path, classes: Classes) -> list[_Folder]:
    parts, names = {}, set(classes.wordnet_ids.values())
    for name, start, size in _files_in(path, 0, path.stat().st_size):
        if name.removesuffix(".tar") not in names or not name.endswith(".tar"):
            raise UserError(f"{path}: holds {printable(name)}, which is no class of {DEVKIT_TAR}; download both anew")
        parts[name.removesuffix(".tar")] = start, size
    if missing := names - set(parts):
        raise UserError(f"{path}: holds no {min(missing)}.tar ({len(missing):,} missing); download it anew")
    return [(name, partial(_images_in, path, *parts[name])) for name in sorted(parts)]


def _val_folders(path: Path, classes: Classes) -> list[_Folder]:
    images = sorted(_files_in(path, 0, path.stat().st_size))
    if len(images) != len(classes.val_ids):
        raise UserError(f"{path}: holds {len(images):,} images instead of {len(classes.val_ids):,}; download it anew")
    by_class = defaultdict(list)
    for image, number in zip(images, classes.val_ids, strict=True):
        by_class[classes.wordnet_ids[number]].append(image)
    return [(name, partial(_images_at, path, images)) for name, images in sorted(by_class.items())]


def _files_in(path: Path, start: int, size: int) -> list[tuple[str, int, int]]:
    """Name, place in `path` and size in bytes of each file in the tar file that lies there within it.

    ImageNet's tar files hold files alone, each with a name of its own. A link, a device, or a name that leads elsewhere
    raises UserError: such a tar file is somebody else's.
    """
    found, end = {}, start + size
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{path}: {printable(member.name)} in it is a link or no plain file; download it anew"
                    )
                if place.is_absolute() or ".." in place.parts or place.name.startswith(".") or not place.name:
                    raise UserError(f"{path}: {printable(member.name)} in it is no name of an image; download it anew")
                if place.name in found:
                    raise UserError(f"{path}: holds {printable(place.name)} twice; download it anew")
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{printable(member.name)} is cut short")
                found[place.name] = (place.name, member.offset_data, member.size)
    return list(found.values())


def _images_in(path: Path, start: int, size: int) -> Iterator[tuple[str, BinaryIO]]:
    """The images of the tar file that lies there within the tar file `path`."""
    images = _files_in(path, start, size)
    if not images:
        raise tarfile.ReadError("a class without images")
    yield from _images_at(path, images)


def _images_at(path: Path, images: list[tuple[str, int, int]]) -> Iterator[tuple[str, BinaryIO]]:
    with open(path, "rb") as file:
        for name, start, size in images:
            file.seek(start)
            yield name, io.BytesIO(file.read(size))


def _unpack_split(split: Path, folders: list[_Folder]) -> None:
    split.mkdir(parents=True, exist_ok=True)
    with os.scandir(split) as entries:
        unfinished = [
            entry.path
            for entry in entries
            if re.fullmatch(rf"\.{_WORDNET_ID}\.tmp", entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for path in unfinished:
        shutil.rmtree(path)
    missing = [(name, images) for name, images in folders if not (split / name).is_dir()]
    if len(missing) < len(folders):
        say(f"{split}: {len(folders) - len(missing):,} of {len(folders):,} class folders are there already")
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda folder: _unpack_folder(split / folder[0], folder[1]), missing)
        try:
            for _ in track(results, total=len(missing), label=f"unpacking {split.name}", unit="classes"):
                pass
        except BaseException:  # Ctrl-C, too: else the pool would unpack all the rest first
            pool.shutdown(cancel_futures=True)
            raise


def _unpack_folder(folder: Path, images: Callable[[], Iterator[tuple[str, BinaryIO]]]) -> None:
    unfinished = folder.with_name(f".{folder.name}.tmp")
    unfinished.mkdir()
    for name, content in images():
        with open(unfinished / name, "xb") as file:
            shutil.copyfileobj(content, file)
    os.sync()  # one call for a thousand files; after it, the folder's name says that all of them are on the disk
    unfinished.rename(folder)


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        parser = FlagParser(prog="python -m pipeline.imagenet", description="Unpack ImageNet's tar files.")
        parser.add_argument("tars", type=Path, help=f"folder with {TRAIN_TAR}, {VAL_TAR}, {DEVKIT_TAR}")
        parser.add_argument("data", type=Path, help="folder to unpack into, for train.py --data")
        arguments = parser.parse_args(argv)
        images = unpack(arguments.tars, arguments.data)
        print(json.dumps({"data": str(arguments.data), **images}))
        return 0

    return run_program(work, interrupted="interrupted; the same command goes on with what is missing")
