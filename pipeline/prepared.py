"""A prepared data set, as pipeline.prepare writes it: shards and an index, in a folder or in an S3 bucket.

index.json               classes, fingerprint, the shards' sizes, how they were made; written last
train-….npy, val-….npy   one row an image (tables.SHARD_ROW), memory-mapped, shared by all ranks
train-000000.tar …       shards in WebDataset's layout: <class>/<row>-<name>.jpg (see pipeline/tiles.py), and .cls with the label
quarantine.tsv           images of the source that could not be decoded and are left out
"""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import cache_folder, replacing
from pipeline.scan import SPLITS
from pipeline.storage import S3_SCHEME, Storage, open_storage
from pipeline.tables import SHARD_ROW, ShardTable, shard_name

INDEX = "index.json"
FORMAT = "vgg-dali prepared 2"


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
    """Whether --data names a prepared data set."""
    return data.startswith(S3_SCHEME) or Path(data, INDEX).is_file()


def open_prepared(data: str, *, check_shards: bool = True) -> Prepared:
    """Open a prepared data set. check_shards: see whether each shard is there in its full length.

    Raises UserError: no index or a foreign one, a shard that is missing or has another length.
    """
    storage = open_storage(data)
    description = read_index(storage)
    try:
        if check_shards:
            _check_shards(storage, description)
        folder = _local_index(storage, description)
        tables = {}
        for split in SPLITS:
            rows = np.load(folder / description["tables"][split], mmap_mode="r")
            if rows.dtype != SHARD_ROW:
                raise ValueError("rows of another kind")
            tables[split] = ShardTable(storage, split, np.asarray(description["shard_images"][split]), rows)
        return Prepared(
            root=storage.url,
            folder=folder,
            classes=tuple(description["classes"]),
            fingerprint=description["fingerprint"],
            quarantined=description["quarantined"],
            val_lost=description["val_lost"],
            **tables,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data {data}: its index is damaged ({error}); prepare or copy the data set anew") from error


def read_index(storage: Storage) -> dict:
    """The content of index.json. Raises UserError."""
    content = io.BytesIO()
    storage.copy(INDEX, content)
    try:
        description = json.loads(content.getvalue())
        if description["format"] == FORMAT:
            return description
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{storage.url}/{INDEX}: not the index of a data set that pipeline.prepare of this version has made; prepare it anew"
    )


def _check_shards(storage: Storage, description: dict) -> None:
    found = storage.sizes()
    for split in SPLITS:
        for shard, expected in enumerate(description["shard_bytes"][split]):
            name = shard_name(split, shard)
            if found.get(name) != expected:
                what = f"has {found[name]:,} bytes instead of {expected:,}" if name in found else "is missing"
                raise UserError(f"{storage.url}/{name} {what}; copy the shard anew")


def _local_index(storage: Storage, description: dict) -> Path:
    """A folder on this machine with the tables: memory can only be mapped to files."""
    if not storage.url.startswith(S3_SCHEME):
        return Path(storage.url)
    name = hashlib.blake2b(storage.url.encode(), digest_size=8).hexdigest()
    folder = cache_folder() / "prepared" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file_name in description["tables"].values():
        if not (folder / file_name).exists():  # the name holds the fingerprint
            with replacing(folder / file_name) as file:
                storage.copy(file_name, file)
    for stale in folder.glob("*.npy"):
        if stale.name not in description["tables"].values():
            with contextlib.suppress(FileNotFoundError):
                stale.unlink()
    return folder
