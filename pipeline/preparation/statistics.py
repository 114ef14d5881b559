"""python -m pipeline.statistics DATA: mean and covariance of a data set's RGB values, for training on it.

DATA is a folder with train/<class>/* and val/<class>/*, or prepared data (a folder or an s3:// URL). Every training image is
decoded whole, as training decodes it; each has the same weight, however large it is, as it has in training. The result is
written as statistics.json beside the manifest or, for prepared data, beside its index (for S3, the index's copy in the user's
cache folder). A run that starts anew then subtracts this mean, and shifts colours along these eigenvectors (section 3.1 of
the paper, after AlexNet); without the file, it takes ImageNet's published figures.
"""

import io
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import DAMAGED_FILE, replacing
from common.flags import FlagParser
from common.process import run_program, usable_cores
from common.progress import say, track
from pipeline.dataset.manifest import Manifest, open_manifest
from pipeline.dataset.table import FileTable
from pipeline.plan.training import ColourShift
from pipeline.shards.index import Prepared, is_prepared, open_prepared
from pipeline.shards.shard_table import ShardTable

STATISTICS = "statistics.json"

_ROWS_A_BLOCK = 1 << 16
# Of an image, decoded at a time: the decoder holds all of it, and what it gives out a second time.
_PIXELS_A_STRIP = 1 << 25
_PIXELS_A_BLOCK = 1 << 17
_MOST_BYTES = 1 << 20  # of statistics.json

_AGAIN = "python -m pipeline.statistics computes them anew"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the RGB values of a data set's training images, in 0–255."""

    fingerprint: str
    """Of the data set."""
    images: int
    """Training images counted."""
    mean_rgb: tuple[float, float, float]
    covariance: tuple[tuple[float, float, float], ...]
    """3×3"""
    eigenvalues: tuple[float, float, float]
    """Of the covariance, the largest first."""
    eigenvectors: tuple[tuple[float, float, float], ...]
    """3×3, the columns of unit length, in the eigenvalues' order."""

    @property
    def colour_shift(self) -> ColourShift:
        # An eigenvalue has the square of the pixels' unit: in units of 255 it is 1/255² of what it is here, the shift 1/255.
        first, second, third = (value / 255 for value in self.eigenvalues)
        return tuple((x * first, y * second, z * third) for x, y, z in self.eigenvectors)


def find_statistics(data: Manifest | Prepared) -> Statistics | None:
    """The statistics of a data set; None where nobody has computed them, or they are another's, with a note.

    Raises UserError where the file is damaged, or cannot be read.
    """
    content = _read(data)
    if content is None:
        return None
    try:
        statistics = _parsed(content)
    except DAMAGED_FILE as error:
        raise UserError(f"{data.folder / STATISTICS}: is damaged; {_AGAIN}") from error
    if statistics.fingerprint != data.fingerprint:
        say(f"note: {data.folder / STATISTICS} is of other images, and not used; {_AGAIN}")
        return None
    return statistics


def _parsed(content: bytes) -> Statistics:
    """Raises one of DAMAGED_FILE, unless these are numbers that images have."""
    found = json.loads(content)
    statistics = Statistics(
        fingerprint=found["fingerprint"],
        images=found["images"],
        mean_rgb=_three(found["mean_rgb"]),
        covariance=_three_by_three(found["covariance"]),
        eigenvalues=_three(found["eigenvalues"]),
        eigenvectors=_three_by_three(found["eigenvectors"]),
    )
    mean, covariance = np.array(statistics.mean_rgb), np.array(statistics.covariance)
    values, vectors = np.array(statistics.eigenvalues), np.array(statistics.eigenvectors)
    if not all(np.isfinite(numbers).all() for numbers in (mean, covariance, values, vectors)):
        raise ValueError
    tolerance = 1e-6 * 255**2
    checks = (
        isinstance(statistics.fingerprint, str),
        type(statistics.images) is int and statistics.images > 0,
        (mean >= 0).all() and (mean <= 255).all(),
        (values >= -tolerance).all() and (np.diff(values) <= tolerance).all(),
        np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-6),
        np.allclose(vectors * values @ vectors.T, covariance, rtol=0, atol=tolerance),
    )
    if not all(checks):
        raise ValueError
    return statistics


def compute_statistics(data: Manifest | Prepared, *, threads: int) -> Statistics:
    """Decode all training images and add them up, in float64; the result does not depend on the threads.

    Raises UserError: none of them can be decoded. TrainingError: a shard cannot be read.
    """
    total, count = np.zeros((4, 4)), 0
    moments = _all_moments(data.train, threads)
    for one in track(moments, total=len(data.train), label="statistics", unit="images"):
        if one is not None:
            total += one
            count += 1
    if not count:
        raise UserError(f"{data.root}: none of the training images can be decoded")
    if lost := len(data.train) - count:
        say(f"warning: {lost:,} training images cannot be decoded and do not count")
    return _from_moments(total / count, images=count, fingerprint=data.fingerprint)


def save_statistics(statistics: Statistics, folder: Path) -> Path:
    """Write statistics.json. Returns its path. Raises UserError where that is not possible."""
    path = folder / STATISTICS
    try:
        with replacing(path) as file:
            file.write(json.dumps(asdict(statistics), indent=1).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def _all_moments(table: FileTable | ShardTable, threads: int) -> Iterator[np.ndarray | None]:
    """Each image's moments, in the table's order; None where it cannot be decoded."""
    # Here, because DALI takes long to import, and training imports this file.
    from pipeline.dali.decoding import decode_whole, each_in_order

    for first in range(0, len(table), _ROWS_A_BLOCK):
        rows, windows = _strips(table, np.arange(first, min(first + _ROWS_A_BLOCK, len(table))))
        decoded = decode_whole(table, rows, windows=windows, threads=threads)
        with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter meanwhile
            sums = each_in_order(pool, lambda strip: (_sums(strip), ""), decoded, ahead=4 * threads)
            for _, strips in itertools.groupby(zip(rows.tolist(), sums, strict=True), key=lambda pair: pair[0]):
                of_strips = [of_strip for _, (of_strip, _) in strips]
                decodable = [of_strip for of_strip in of_strips if of_strip is not None]
                total = np.sum(decodable, axis=0)
                yield total / total[0, 0] if len(decodable) == len(of_strips) else None


def _strips(table: FileTable | ShardTable, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is decoded at a time: rows, those of large images several times, and a window of each, int64 [n, 2, 2]."""
    sizes = table.read(rows).sizes
    counts = np.minimum(-(-sizes.prod(axis=1) // _PIXELS_A_STRIP), sizes[:, 0])
    image = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    heights, widths = sizes[image].T
    tops, ends = (heights * which // counts[image] for which in (number, number + 1))
    begins, extents = np.stack((tops, np.zeros_like(tops)), axis=1), np.stack((ends - tops, widths), axis=1)
    return rows[image], np.stack((begins, extents), axis=1)


def _sums(image: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] → the sums over the pixels of all products of (1, R, G, B), float64 [4, 4].

    Sums of products of bytes are integers, exact in float64 in any order, up to images of 10¹¹ pixels: so they are summed
    up in blocks, whose float64 copies take little memory.
    """
    pixels = image.reshape(-1, 3)
    block = np.ones((4, min(len(pixels), _PIXELS_A_BLOCK)))
    total = np.zeros((4, 4))
    for first in range(0, len(pixels), _PIXELS_A_BLOCK):
        some = pixels[first : first + _PIXELS_A_BLOCK]
        block[1:, : len(some)] = some.T
        total += block[:, : len(some)] @ block[:, : len(some)].T
    return total


def _from_moments(moments: np.ndarray, *, images: int, fingerprint: str) -> Statistics:
    mean = moments[0, 1:]
    covariance = moments[1:, 1:] - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)  # ascending
    return Statistics(
        fingerprint=fingerprint,
        images=images,
        mean_rgb=_three(mean),
        covariance=tuple(map(_three, covariance)),
        eigenvalues=_three(values[::-1]),
        eigenvectors=tuple(map(_three, vectors[:, ::-1])),
    )


def _three(values: np.ndarray | list[float]) -> tuple[float, float, float]:
    first, second, third = map(float, values)
    return first, second, third


def _three_by_three(rows: list[list[float]]) -> tuple[tuple[float, float, float], ...]:
    first, second, third = map(_three, rows)
    return first, second, third


def _read(data: Manifest | Prepared) -> bytes | None:
    path = data.folder / STATISTICS
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or remove it") from error
    if (
        isinstance(data, Prepared) and STATISTICS in data.train.storage.sizes()
    ):  # in a bucket, copied there with the shards
        content = io.BytesIO()
        data.train.storage.copy(STATISTICS, content, _MOST_BYTES)
        return content.getvalue()
    return None


# ---- command line ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()

    def work() -> int:
        parser = FlagParser(
            prog="python -m pipeline.statistics", description="Compute a data set's RGB mean and covariance."
        )
        parser.add_argument("data", help="folder with train/<class>/* and val/<class>/*, or prepared data")
        name = parser.parse_args(argv).data
        data = open_prepared(name) if is_prepared(name) else open_manifest(Path(name))
        statistics = compute_statistics(data, threads=usable_cores())
        path = save_statistics(statistics, data.folder)
        _print_table(statistics)
        seconds = time.monotonic() - started
        print(json.dumps({**asdict(statistics), "statistics": str(path), "seconds": round(seconds, 1)}))
        return 0

    return run_program(work, interrupted="interrupted; nothing was written")


def _print_table(statistics: Statistics) -> None:
    print(f"{'':>12}{'R':>10}{'G':>10}{'B':>10}")
    print(f"{'mean':>12}" + "".join(f"{value:>10.3f}" for value in statistics.mean_rgb))
    deviations = np.sqrt(np.diag(statistics.covariance))
    print(f"{'deviation':>12}" + "".join(f"{value:>10.3f}" for value in deviations))
    for value, vector in zip(statistics.eigenvalues, np.transpose(statistics.eigenvectors), strict=True):
        print(f"{'eigenvector':>12}" + "".join(f"{share:>10.4f}" for share in vector) + f"   eigenvalue {value:.2f}")
