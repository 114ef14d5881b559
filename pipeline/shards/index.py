"""A prepared data set, as pipeline.prepare writes it: shards and an index, in a folder or in an S3 bucket.

index.json               classes, fingerprint, the shards' sizes, how they were made; written last
train-….npy, val-….npy   one row an image (tables.SHARD_ROW), memory-mapped, shared by all ranks
train-000000.tar …       shards in WebDataset's layout: <class>/<row>-<name>.jpg (see tiles.py), or .ppm for images that are
                         kept as pixels (see raw.py), and .cls with the label
quarantine.tsv           images of the source that could not be decoded and are left out

Whoever can write to a bucket can write anything into its index. So index.json may name nothing, and promise nothing, that is not
of this form; tables are checked whole, against the shards' sizes and the fingerprint, while they are copied from a bucket; and
those of the rows that are asked for are checked once more when they are, in a folder too, where a start costs no time an image.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import UserError
from common.files import DAMAGED_FILE, cache_folder, remove_own, replacing
from pipeline.dataset.scan import SPLITS
from pipeline.dataset.table import TABLE_NAMES
from pipeline.shards.shard_table import SHARD_ROW, ShardTable, shard_name, what_is_wrong
from pipeline.shards.storage import S3_SCHEME, Storage, open_storage

INDEX = "index.json"
_FORMAT_NAME = "vgg-dali prepared "
FORMAT = f"{_FORMAT_NAME}2"
RAW_FORMAT = f"{_FORMAT_NAME}raw 1"
"""Of images that are kept as pixels. Versions before it refuse it like any format that they do not know."""

_MOST_INDEX_BYTES = 64 << 20  # a billion images, in shards of 2048, take a sixth of it
_MOST_IMAGES = 1 << 40
_ROWS_A_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared data set."""

    root: str
    """The folder or the s3:// URL."""
    folder: Path
    """Where the index lies: the data set's folder or, for S3, a copy in the user's cache folder."""
    classes: tuple[str, ...]
    """Class names in label order."""
    fingerprint: str
    """Changes with every change of an image's place, size or label."""
    quarantined: int
    """Images of the source that were left out; folder/quarantine.tsv names each with the reason."""
    val_lost: int
    """Validation images among them: they count as wrong."""
    train: ShardTable
    val: ShardTable


def is_prepared(data: str) -> bool:
    """Whether --data names a prepared data set. A folder of class folders may have an index.json of its own."""
    if data.startswith(S3_SCHEME):
        return True
    folder = Path(data)
    if not os.path.isfile(folder / INDEX):  # nor where the folder may not be entered, which the scan will say
        return False
    return is_complete(folder) or not all((folder / split).is_dir() for split in SPLITS)


def is_complete(folder: Path) -> bool:
    """Whether a folder has an index that pipeline.prepare has written last, of this version or of an earlier one."""
    if not (folder / INDEX).is_file():
        return False
    with contextlib.suppress(*DAMAGED_FILE, UserError):
        return str(_parsed(open_storage(str(folder)))["format"]).startswith(_FORMAT_NAME)
    return False


def open_prepared(data: str, *, check_shards: bool = True) -> Prepared:
    """Open a prepared data set. check_shards: see whether each shard is there in its full length.

    Raises UserError: no index or a foreign one, a shard that is missing or has another length, no room for a bucket's index.
    """
    storage = open_storage(data)
    description = read_index(storage)
    if check_shards:
        _check_shards(storage, description)
    folder = _local_index(storage, description)
    tables = {}
    for split in SPLITS:
        name = _table_name(split, description)
        try:
            # Not np.load, which opens archives too. What is mapped holds no Python objects, whatever its header says.
            rows = np.lib.format.open_memmap(folder / name, mode="r")
        except DAMAGED_FILE as error:
            raise _damaged(storage, f"{name}: {error}") from error
        if rows.dtype != SHARD_ROW or rows.ndim != 1:
            raise _damaged(storage, f"{name}: rows of another kind")
        if len(rows) != description["images"][split]:
            raise _damaged(storage, f"{name}: {len(rows):,} rows instead of {description['images'][split]:,}")
        images, sizes = (np.array(description[key][split], dtype=np.int64) for key in ("shard_images", "shard_bytes"))
        tables[split] = ShardTable(
            storage,
            split,
            rows,
            shard_images=images,
            shard_bytes=sizes,
            classes=description["classes"],
            is_raw=description["format"] == RAW_FORMAT,
        )
    return Prepared(
        root=storage.url,
        folder=folder,
        classes=tuple(description["classes"]),
        fingerprint=description["fingerprint"],
        quarantined=description["quarantined"],
        val_lost=description["val_lost"],
        **tables,
    )


def read_index(storage: Storage) -> dict:
    """The content of index.json, in which all is of the form that pipeline.prepare gives it. Raises UserError."""
    try:
        description = _parsed(storage)
        is_ours = description["format"] in (FORMAT, RAW_FORMAT)
    except DAMAGED_FILE:
        is_ours = False
    if not is_ours:
        raise UserError(
            f"{storage.url}/{INDEX}: not the index of a data set that pipeline.prepare of this version has made; prepare it anew"
        )
    try:
        for wrong in _faults(description):
            raise _damaged(storage, f"{INDEX}: {wrong}")
    except DAMAGED_FILE as error:
        raise _damaged(storage, f"{INDEX}: {type(error).__name__} {error}") from error
    return description


def _damaged(storage: Storage, what: str) -> UserError:
    return UserError(f"--data {storage.url}: its index is damaged ({what}); prepare or copy the data set anew")


def _parsed(storage: Storage) -> dict:
    content = io.BytesIO()
    storage.copy(INDEX, content, _MOST_INDEX_BYTES)
    return json.loads(content.getvalue(), parse_constant=_no_number)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _faults(description: dict) -> Iterator[str]:
    """What is wrong with the content of an index.json."""
    classes, fingerprint = description["classes"], description["fingerprint"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        yield "classes are not a list of names"
    elif len(set(classes)) < len(classes):
        yield "two classes of one name"
    elif any(name in ("", ".", "..") or "/" in name or "\0" in name for name in classes):
        yield "a class whose name no folder can have"
    if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{32}", fingerprint):
        yield "no fingerprint"
    if description["tables"] != {split: _table_name(split, description) for split in SPLITS}:
        yield "tables of other names"
    if not isinstance(description["job"]["source"], str) or not isinstance(description["job"]["settings"], dict):
        yield "it does not say how it was prepared"
    for key in ("quarantined", "val_lost"):
        if not _are_counts([description[key]]):
            yield f"{key} is no number of images"
    for split in SPLITS:
        images, shard_images = description["images"][split], description["shard_images"][split]
        if not _are_counts([images]) or images < 1:
            yield f"{split} has no images"
        elif not _are_counts(shard_images) or sum(shard_images) != images:
            yield f"the images of {split}'s shards do not add up to {images:,}"
        elif not _are_counts(description["shard_bytes"][split]):
            yield f"{split}'s shards have sizes that are none"
        elif len(description["shard_bytes"][split]) != len(shard_images):
            yield f"{split} has sizes of {len(description['shard_bytes'][split]):,} shards, and images of {len(shard_images):,}"


def _are_counts(numbers: list) -> bool:
    """Whether these are whole numbers that no data set exceeds; bool is a number too, in Python."""
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < _MOST_IMAGES for number in numbers)


def _table_name(split: str, description: dict) -> str:
    return f"{split}-{description['fingerprint']}.npy"


def fingerprint_of(classes: list[str], rows: Iterator[np.ndarray]) -> str:
    """The fingerprint of a data set: of its classes, and of the rows of train and then val, in blocks of any length."""
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for block in rows:
        digest.update(block.data)
    return digest.hexdigest()


def _check_shards(storage: Storage, description: dict) -> None:
    found = storage.sizes()
    for split in SPLITS:
        for shard, expected in enumerate(description["shard_bytes"][split]):
            name = shard_name(split, shard)
            if found.get(name) != expected:
                what = f"has {found[name]:,} bytes instead of {expected:,}" if name in found else "is missing"
                raise UserError(f"{storage.url}/{name} {what}; copy the shard anew")


def _local_index(storage: Storage, description: dict) -> Path:
    """A folder on this machine with the tables: memory can only be mapped to files. Raises UserError."""
    if not storage.url.startswith(S3_SCHEME):
        return Path(storage.url)
    folder = cache_folder() / "prepared" / hashlib.blake2b(storage.url.encode(), digest_size=8).hexdigest()
    names = [_table_name(split, description) for split in SPLITS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all((folder / name).exists() for name in names):
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(replacing(folder / name)) for name in names]
                for split, name, file in zip(SPLITS, names, files, strict=True):
                    most = description["images"][split] * SHARD_ROW.itemsize + np.lib.format.BUFFER_SIZE
                    storage.copy(name, file, most)
                blocks = itertools.chain.from_iterable(
                    _checked(file, split, storage, description) for split, file in zip(SPLITS, files, strict=True)
                )
                if fingerprint_of(description["classes"], blocks) != description["fingerprint"]:
                    raise _damaged(storage, "its tables are not those of its fingerprint")
        if not folder.is_symlink():
            remove_own(folder, TABLE_NAMES, but=names)  # of what was in the bucket before
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _checked(file: BinaryIO, split: str, storage: Storage, description: dict) -> Iterator[np.ndarray]:
    """The rows of a table, block by block, each of them checked. Raises UserError."""
    name = _table_name(split, description)
    file.seek(0)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("a version of NumPy's files that is not used here")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except DAMAGED_FILE as error:
        raise _damaged(storage, f"{name}: {error}") from error
    if dtype != SHARD_ROW or shape != (description["images"][split],) or (is_fortran and len(shape) > 1):
        raise _damaged(storage, f"{name}: rows of another kind")
    images, sizes = (np.array(description[key][split], dtype=np.int64) for key in ("shard_images", "shard_bytes"))
    ends, done = np.cumsum(images), 0
    while done < shape[0]:
        rows = np.frombuffer(file.read(min(_ROWS_A_BLOCK, shape[0] - done) * SHARD_ROW.itemsize), dtype=SHARD_ROW)
        if not len(rows):
            raise _damaged(storage, f"{name}: {done:,} rows instead of {shape[0]:,}")
        wrong = what_is_wrong(
            rows,
            shard_bytes=sizes,
            classes=len(description["classes"]),
            is_raw=description["format"] == RAW_FORMAT,
        )
        if (
            not wrong
            and (rows["shard"] != np.searchsorted(ends, np.arange(done, done + len(rows)), side="right")).any()
        ):
            wrong = "an image in another shard than its place in the table says"
        if wrong:
            raise _damaged(storage, f"{name}: {wrong}")
        done += len(rows)
        yield rows
