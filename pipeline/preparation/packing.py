"""python -m pipeline.prepare SRC DST --short-side 256: resize a data set once and pack it into shards, for --data DST.

SRC holds train/<class>/* and val/<class>/*. Every image is decoded as in training, made smaller where it is larger than asked
for (never larger), and written into DST's tar files, in WebDataset's layout (pipeline/shards/index.py).

    --short-side 256       the shorter side becomes 256 pixels: for training at S = 256, which then only crops
    --short-side max:500   the longer side becomes at most 500 pixels: for scale jitter within less space
    --format jpeg          as baseline JPEGs in tiles, of which training decodes what it needs (pipeline/shards/tiles.py)
    --format raw           as pixels, of which training reads what it needs (pipeline/shards/raw.py)

Under torchrun the shards are shared out among all ranks and machines. Interrupted, the same command goes on with the shard
that it was at. What is written depends on SRC and the flags alone.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from common.errors import TrainingError, UserError
from common.files import DAMAGED_FILE, half_written, remove_own, replacing
from common.flags import FlagParser
from common.lock import FolderLock
from common.process import MOST_THREADS, is_of_a_name, run_program
from common.progress import printable, say, track
from common.ranks import Ranks, on_rank_0, ranks_of_this_run, wait_for_all
from pipeline.dali.decoding import decode_whole, each_in_order
from pipeline.dataset.manifest import Manifest, load_manifest, open_manifest
from pipeline.dataset.quarantine import QUARANTINE, read_quarantine, write_quarantine
from pipeline.dataset.scan import SPLITS, check_no_empty_class
from pipeline.dataset.table import TABLE_NAMES, FileTable
from pipeline.plan import random_numbers
from pipeline.plan.samples import rescaled_sizes
from pipeline.shards.index import FORMAT, INDEX, RAW_FORMAT, fingerprint_of, is_complete, read_index
from pipeline.shards.raw import ppm
from pipeline.shards.shard_table import LONGEST_SIDE, SHARD_NAMES, SHARD_ROW, shard_name
from pipeline.shards.storage import S3_SCHEME, open_storage
from pipeline.shards.tiles import tiled_jpeg

_UNFINISHED = ".unfinished"  # in DST: what is known of the shards that are done
_JOB = "job.json"  # in there: what they are made of, and how
_MAX_MEMBER_NAME = 100  # bytes that every tar format holds in one header
_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a data set is prepared."""

    short_side: str
    """"256": the shorter side in pixels; "max:500": the most that the longer side may have."""
    quality: int | None
    """Of the JPEGs, 1–95; None: images are kept as pixels."""
    shard_images: int
    """Images in a shard; the last one of a split may have fewer."""

    @property
    def pixels(self) -> int:
        return int(self.short_side.removeprefix("max:"))

    @property
    def format(self) -> str:
        return RAW_FORMAT if self.quality is None else FORMAT

    def sizes(self, sizes: np.ndarray) -> np.ndarray:
        """What images of these sizes (int64 [n, 2]) are resized to: int64 [n, 2], never larger."""
        if self.short_side.startswith("max:"):
            side = sizes.max(axis=1, keepdims=True)
            smaller = np.maximum((2 * sizes * self.pixels + side) // (2 * side), 1)
        else:
            side = sizes.min(axis=1, keepdims=True)
            smaller = rescaled_sizes(sizes, np.full(len(sizes), self.pixels))
        return np.where(side > self.pixels, smaller, sizes)


class Shard(NamedTuple):
    """A shard to be written."""

    split: str
    number: int
    rows: np.ndarray
    """int64 [n]: of the source's table, in the order of the shard."""

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def prepare(source: Path, destination: Path, settings: Settings, *, threads: int, ranks: Ranks) -> dict:
    """Prepare a data set, or the rest of it, together with the other ranks. Returns a summary, as plain values.

    Raises UserError: a source that is no data folder, a destination that holds something else or cannot be written, or that
    others are preparing. TrainingError: the source fails, or what is known of a shard is damaged.
    """
    with FolderLock(destination / _UNFINISHED) as lock:  # of rank 0, for all ranks
        return _prepare(source, destination, settings, threads=threads, ranks=ranks, lock=lock)


def _prepare(
    source: Path, destination: Path, settings: Settings, *, threads: int, ranks: Ranks, lock: FolderLock
) -> dict:
    root, folder = on_rank_0(ranks, lambda: _begin(source, destination, settings, lock))
    manifest = load_manifest(root, folder)
    if is_complete(destination):
        say(f"{destination} is complete already")
        return _summary(destination)
    shards = _shards(manifest, settings)
    mine = [shard for shard in shards[ranks.rank :: ranks.world_size] if not _part(destination, shard).exists()]
    images = _write_shards(mine, manifest, destination, settings, threads)
    if ranks.is_main:
        total = sum(len(shard.rows) for shard in mine)
        images = track(images, total=total, label=f"preparing, rank 0 of {ranks.world_size}", unit="images")
    for _ in images:
        pass
    wait_for_all(ranks)
    if ranks.is_main:
        _finish(shards, manifest, destination, settings)
    wait_for_all(ranks)
    return _summary(destination)


# ---- the beginning: is everything as it should be? ---------------------------------------------------------------


def _begin(source: Path, destination: Path, settings: Settings, lock: FolderLock) -> tuple[Path, Path]:
    """Open the source and claim the destination, on rank 0. Returns the manifest's root and folder."""
    manifest = open_manifest(source)
    job = _job(manifest, settings)
    unfinished = destination / _UNFINISHED
    if not is_complete(destination):
        try:
            destination.mkdir(parents=True, exist_ok=True)
            is_new = not any(entry.name != _UNFINISHED for entry in destination.iterdir())
            if unfinished.is_symlink() or not (is_new or (unfinished / _JOB).is_file()):
                raise UserError(f"{destination}: is not empty; give a new folder for the prepared data")
            unfinished.mkdir(exist_ok=True)
            lock.take()
            # Others may have come before the lock.
            if not is_complete(destination) and not (unfinished / _JOB).exists():
                with replacing(unfinished / _JOB) as file:
                    file.write(json.dumps(job).encode())
            remove_own(
                destination, half_written(rf"{SHARD_NAMES}|{TABLE_NAMES}|{re.escape(INDEX)}|{re.escape(QUARANTINE)}")
            )
        except OSError as error:
            raise UserError(f"{destination}: cannot be written ({error.strerror})") from error
    if is_complete(destination):
        found = read_index(open_storage(str(destination)))["job"]
        _remove_notes(unfinished)
    else:
        found = _read_job(unfinished / _JOB)
        if found == job and any(unfinished.glob("*.npz")):
            say(f"going on with {destination}")
    if found != job:
        what = "from other images" if found["source"] != job["source"] else f"with {_flags(found['settings'])}"
        raise UserError(f"{destination}: was prepared {what}; give the same again, or a new folder")
    return manifest.root, manifest.folder


def _job(manifest: Manifest, settings: Settings) -> dict:
    return {"format": settings.format, "source": manifest.fingerprint, "settings": asdict(settings)}


def _read_job(path: Path) -> dict:
    try:
        job = json.loads(path.read_text())
        if isinstance(job["source"], str) and isinstance(job["settings"], dict):
            return job
    except DAMAGED_FILE:
        pass
    raise UserError(f"{path}: does not say any more what is being prepared; give a new folder for the prepared data")


def _remove_notes(unfinished: Path) -> None:
    """Remove what was known of the shards, and the lock: whoever waits for it finds the data set complete."""
    if unfinished.is_dir() and not unfinished.is_symlink():
        notes = rf"{re.escape(_JOB)}|{SHARD_NAMES}\.npz"
        remove_own(unfinished, f"{notes}|{half_written(notes)}|{re.escape(FolderLock.NAME)}")
        with contextlib.suppress(OSError):  # something is in it that is not ours
            unfinished.rmdir()


def _flags(settings: dict) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {value}" if value is not None else "--format raw"
        for name, value in settings.items()
    )


def _shards(manifest: Manifest, settings: Settings) -> list[Shard]:
    """All shards. Training images are shuffled, so that each shard is a random sample of them; validation ones are not."""
    shards = []
    for split in SPLITS:
        count = len(_table(manifest, split))
        for number, first in enumerate(range(0, count, settings.shard_images)):
            rows = np.arange(first, min(first + settings.shard_images, count))
            if split == "train":
                rows = random_numbers.order(
                    rows, np.zeros_like(rows), count, seed=0, purpose=random_numbers.PURPOSE_PACKING
                )
            shards.append(Shard(split, number, rows))
    return shards


def _table(manifest: Manifest, split: str) -> FileTable:
    return manifest.train if split == "train" else manifest.val


def _part(destination: Path, shard: Shard) -> Path:
    return destination / _UNFINISHED / f"{shard.name}.npz"


# ---- shards ------------------------------------------------------------------------------------------------------


def _write_shards(
    shards: list[Shard], manifest: Manifest, destination: Path, settings: Settings, threads: int
) -> Iterator[None]:
    """Write the shards, each with a part of the index beside it; yields after each image."""
    encode = functools.partial(_encode, quality=settings.quality)
    extension = ".ppm" if settings.quality is None else ".jpg"
    with ThreadPoolExecutor(threads) as pool:  # PIL lets go of the interpreter meanwhile
        for shard in shards:
            table = _table(manifest, shard.split)
            source, labels, sizes = table.read(shard.rows)
            sizes = settings.sizes(sizes)
            decoded = decode_whole(table, shard.rows, sizes=sizes, threads=threads)
            members = each_in_order(pool, encode, decoded, ahead=4 * threads)
            good, places, reasons = [], [], {}
            with (
                replacing(destination / shard.name) as file,
                tarfile.open(
                    fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
                ) as tar,
            ):
                for n, (member, reason) in enumerate(members):
                    if member is None:
                        reasons[table.name(source[n])] = reason
                    else:
                        key = _key(manifest.classes[labels[n]], int(shard.rows[n]), table.name(source[n]))
                        places.append((_add(tar, key + extension, member), len(member)))
                        _add(tar, f"{key}.cls", str(labels[n]).encode())
                        good.append(n)
                    yield
            index = np.zeros(len(good), dtype=SHARD_ROW)
            index["shard"] = shard.number
            index["label"] = labels[good]
            index["height"], index["width"] = sizes[good].T
            if places:
                index["offset"], index["bytes"] = np.transpose(places)
            with replacing(_part(destination, shard)) as file:
                _save_part(file, index, reasons)


def _encode(image: np.ndarray, quality: int | None) -> tuple[bytes | None, str]:
    height, width, _ = image.shape
    if quality is None:
        if max(height, width) > LONGEST_SIDE:
            return None, f"a side of more than {LONGEST_SIDE:,} pixels ({width}×{height})"
        return ppm(image), ""
    try:
        return tiled_jpeg(image, quality), ""
    except (OSError, ValueError):
        return None, f"too long for a JPEG ({width}×{height} pixels)"


def _key(class_name: str, row: int, path: str) -> str:
    """A member's name without its extension: what follows the first dot of a base name is one, to WebDataset."""
    stem = os.fsencode(os.path.splitext(os.path.basename(path))[0].replace(".", "_"))
    head = os.fsencode(f"{class_name}/{row:09d}")
    return os.fsdecode((head + b"-" + stem)[: max(_MAX_MEMBER_NAME - len(b".jpg"), len(head))])


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member, the same bytes at any time and for any user. Returns the offset of its content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _save_part(file: BinaryIO, index: np.ndarray, reasons: dict[str, str]) -> None:
    np.savez(file, index=index, reasons=np.frombuffer(json.dumps(reasons).encode(), dtype=np.uint8))


# ---- the end -----------------------------------------------------------------------------------------------------


def _finish(shards: list[Shard], manifest: Manifest, destination: Path, settings: Settings) -> None:
    """Join the parts of the index and write it; index.json, written last, makes the data set complete."""
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    reasons: dict[str, str] = {}
    for shard in shards:
        try:
            with np.load(_part(destination, shard)) as part:
                parts[shard.split].append(part["index"])
                reasons |= json.loads(part["reasons"].tobytes())
        except (*DAMAGED_FILE, zipfile.BadZipFile, zlib.error) as error:
            raise TrainingError(
                f"{_part(destination, shard)}: is damaged; remove it, and give the same command"
            ) from error
    tables = {split: np.concatenate(parts[split]) for split in SPLITS}
    root = os.path.abspath(manifest.root)
    quarantine = read_quarantine(manifest.folder)[: manifest.quarantined]
    quarantine += [(printable(os.path.relpath(path, root)), printable(reason)) for path, reason in reasons.items()]
    for split in SPLITS:
        labels = np.unique(tables[split]["label"]).tolist()
        check_no_empty_class(manifest.root, split, list(manifest.classes), labels, quarantine)
    fingerprint = fingerprint_of(list(manifest.classes), (tables[split] for split in SPLITS))
    table_names = {split: f"{split}-{fingerprint}.npy" for split in SPLITS}
    description = {
        "format": settings.format,
        "fingerprint": fingerprint,
        "classes": manifest.classes,
        "images": {split: len(tables[split]) for split in SPLITS},
        "quarantined": len(quarantine),
        "val_lost": manifest.val_lost + sum(path.startswith(os.path.join(root, "val", "")) for path in reasons),
        "tables": table_names,
        "shard_images": {split: [len(part) for part in parts[split]] for split in SPLITS},
        "shard_bytes": {
            split: [(destination / shard.name).stat().st_size for shard in shards if shard.split == split]
            for split in SPLITS
        },
        "job": _job(manifest, settings),
    }
    for split in SPLITS:
        with replacing(destination / table_names[split]) as file:
            np.save(file, tables[split])
    write_quarantine(destination, quarantine)
    with replacing(destination / INDEX) as file:
        file.write(json.dumps(description).encode())
    _remove_notes(destination / _UNFINISHED)


def _summary(destination: Path) -> dict:
    description = read_index(open_storage(str(destination)))
    return {
        "data": str(destination),
        "classes": len(description["classes"]),
        **description["images"],
        "shards": sum(map(len, description["shard_images"].values())),
        "bytes": sum(map(sum, description["shard_bytes"].values())),
        "quarantined": description["quarantined"],
        "fingerprint": description["fingerprint"],
    }


# ---- command line ------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> Settings:
    if arguments.format == "raw" and arguments.quality is not None:
        raise UserError(f"--quality {arguments.quality}: --format raw has none; leave it out")
    quality = None if arguments.format == "raw" else _QUALITY if arguments.quality is None else arguments.quality
    settings = Settings(short_side=arguments.short_side, quality=quality, shard_images=arguments.shard_images)
    if not arguments.short_side.removeprefix("max:").isdecimal() or settings.pixels < 1:
        raise UserError(
            f"--short-side {arguments.short_side}: give a number of pixels, as 256, or a maximum, as max:500"
        )
    if quality is not None and not 1 <= quality <= 95:
        raise UserError(f"--quality {quality}: must be in 1–95")
    if settings.shard_images < 1:
        raise UserError(f"--shard-images {settings.shard_images}: must be at least 1")
    if arguments.threads is not None and not 1 <= arguments.threads <= MOST_THREADS:
        raise UserError(f"--threads {arguments.threads}: must be in [1, {MOST_THREADS}]")
    if str(arguments.destination).startswith(S3_SCHEME.rstrip("/")):
        raise UserError(f"{arguments.destination}: prepare into a folder, then copy it to the bucket")
    return settings


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv), interrupted="interrupted; start the same command again to go on")


def _run(argv: list[str] | None) -> int:
    parser = FlagParser(
        prog="python -m pipeline.prepare", description="Resize a data set once and pack it into shards."
    )
    parser.add_argument("source", type=Path, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument(
        "destination", type=Path, help="new folder for the shards and their index; give it to train.py as --data"
    )
    parser.add_argument(
        "--short-side",
        default="256",
        help="shorter side in pixels (256), or max:N for a longer side of at most N; smaller images stay as they are",
    )
    parser.add_argument(
        "--format",
        choices=("jpeg", "raw"),
        default="jpeg",
        help="how images are kept: as JPEGs (jpeg), or as pixels (raw: nothing to decode, 3 bytes a pixel) (jpeg)",
    )
    parser.add_argument("--quality", type=int, help=f"quality of the JPEGs, 1–95 ({_QUALITY})")
    parser.add_argument("--shard-images", type=int, default=2048, help="images in a shard (2048)")
    parser.add_argument("--threads", type=int, help="threads of each rank (its share of the cores)")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    settings = _check(arguments)
    try:
        with ranks_of_this_run("cpu") as ranks:
            threads = arguments.threads or ranks.cpu_share
            summary = prepare(arguments.source, arguments.destination, settings, threads=threads, ranks=ranks)
            if ranks.is_main:
                print(json.dumps({**summary, "seconds": round(time.monotonic() - started, 1)}))
    except OSError as error:
        place = error.filename or arguments.destination
        reason = error.strerror or error
        if is_of_a_name(error) and Path(place).is_relative_to(arguments.destination):
            raise UserError(f"{place}: cannot be written ({reason}); choose another folder") from error
        raise TrainingError(f"{place}: {reason}; when that is mended, the same command goes on") from error
    return 0
