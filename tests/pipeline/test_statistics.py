"""Mean and covariance of a data set's colours, against PIL and NumPy."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipeline.dataset.manifest import open_manifest
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT
from pipeline.preparation import packing, statistics
from pipeline.preparation.statistics import STATISTICS, Statistics, find_statistics
from pipeline.shards.index import open_prepared
from tests.support.images import photo_folder, photographs
from tests.support.launch import ROOT


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = photo_folder(tmp_path_factory.mktemp("data") / "photos", train=15, val=3)
    Image.open(folder / "train/class0/000.JPEG").resize((1, 1)).save(folder / "train/class0/pixel.png")
    return folder


def expected_of(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of colours drawn so: an image, each as likely as the other, and then a pixel of it."""
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    weights = np.concatenate([np.full(image.size // 3, 3 / image.size / len(images)) for image in images])
    mean = np.average(pixels, axis=0, weights=weights)
    return mean, np.cov(pixels.T, aweights=weights, ddof=0)


def test_they_are_numpys_over_pils_images(photos, capsys):
    assert statistics.main([str(photos)]) == 0
    found = find_statistics(open_manifest(photos))
    assert found
    mean, covariance = expected_of([np.array(Image.open(path).convert("RGB")) for path in photos.glob("train/*/*")])
    assert found.images == 16
    assert np.allclose(found.mean_rgb, mean, rtol=1e-12)
    assert np.allclose(found.covariance, covariance, rtol=1e-9)
    vectors, values = np.array(found.eigenvectors), np.array(found.eigenvalues)
    assert np.allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-9)
    assert np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert list(values) == sorted(values, reverse=True)
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 6
    assert json.loads(last)["mean_rgb"] == list(found.mean_rgb)
    assert json.loads(last)["statistics"] == str(photos / ".vgg-manifest" / STATISTICS)


def test_prepared_data_too_whatever_the_threads(photos, tmp_path):
    prepared = tmp_path / "prepared"
    assert packing.main([str(photos), str(prepared), "--short-side", "64", "--shard-images", "4"]) == 0
    assert find_statistics(open_prepared(str(prepared))) is None
    assert statistics.main([str(prepared)]) == 0
    data = open_prepared(str(prepared))
    found = find_statistics(data)
    assert found
    assert statistics.compute_statistics(data, threads=1) == found
    images = []
    for shard in sorted(prepared.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            images += [np.array(Image.open(tar.extractfile(member)).convert("RGB")) for member in members]  # type: ignore[arg-type]
    mean, covariance = expected_of(images)
    assert np.allclose(found.mean_rgb, mean, rtol=1e-12)
    assert np.allclose(found.covariance, covariance, rtol=1e-9)


@pytest.mark.parametrize("block", [1, 7, 1000, 1 << 17])
def test_sums_in_blocks_are_the_sums_at_once_to_the_last_bit(monkeypatch, block):
    monkeypatch.setattr(statistics, "_PIXELS_A_BLOCK", block)
    image = np.random.default_rng(0).integers(0, 256, (37, 83, 3), dtype=np.uint8)
    pixels = np.ones((4, 37 * 83))
    pixels[1:] = image.reshape(-1, 3).T
    assert np.array_equal(statistics._sums(image), pixels @ pixels.T)


@pytest.mark.parametrize("pixels", [3000, 50])
@pytest.mark.seconds
def test_images_in_strips_are_the_images_at_once_to_the_last_bit(tmp_path, monkeypatch, pixels):
    """Of every format, odd sizes, and one that cannot be decoded."""
    image = photographs()[0].resize((151, 97))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in ("x.jpg", "x.png", "x.bmp", "x.ppm", "x.tif", "x.webp"):
            image.save(tmp_path / split / "a" / name)
        image.save(tmp_path / split / "a/progressive.jpg", progressive=True)
        image.save(tmp_path / split / "a/cut.bmp")
    os.truncate(tmp_path / "train/a/cut.bmp", 20_000)
    data = open_manifest(tmp_path)
    at_once = statistics.compute_statistics(data, threads=2)
    assert (len(data.train), at_once.images) == (8, 7)
    monkeypatch.setattr(statistics, "_PIXELS_A_STRIP", pixels)  # 50: strips of one row
    assert statistics.compute_statistics(data, threads=2) == at_once


def test_memory_beside_an_image_does_not_grow_with_it():
    image = np.zeros((6000, 6000, 3), dtype=np.uint8)
    tracemalloc.start()
    statistics._sums(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6, "float64 copies of all of it would take 1.2 GB"


PEAK = """
import sys
from pathlib import Path
from pipeline.dali import decoding
from pipeline.preparation import statistics
from pipeline.dataset.manifest import open_manifest
# Not ru_maxrss, which begins with what the process that started this one had.
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
data = open_manifest(Path(sys.argv[1]))
before = peak()
assert statistics.compute_statistics(data, threads=2).images == 3
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_for_images_of_177_megapixels(tmp_path):
    """Two in a row, so that what is decoded ahead counts too."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (50, 40)).save(tmp_path / split / "a/small.png")
    for number in range(2):
        Image.new("RGB", (13_300, 13_300), (number, 2, 3)).save(tmp_path / f"train/a/{number}.png", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) < 3 * 13_300**2 + 500e6


def test_colour_shift_is_in_the_units_of_the_published_figures():
    """An image set whose covariance has ImageNet's published eigenvalues (for pixels in 0–1) gets ImageNet's shift."""
    shift = np.array(IMAGENET_COLOUR_SHIFT)
    lengths = np.linalg.norm(shift, axis=0)
    own = Statistics(
        fingerprint="",
        images=1,
        mean_rgb=(0.0, 0.0, 0.0),
        covariance=((0.0, 0.0, 0.0),) * 3,
        eigenvalues=(0.2175 * 255**2, 0.0188 * 255**2, 0.0045 * 255**2),
        eigenvectors=tuple(tuple(row) for row in shift / lengths),
    )
    assert np.allclose(own.colour_shift, shift, rtol=3e-3, atol=0.01), "the figures are published with four digits"


def test_images_that_cannot_be_decoded_do_not_count(photos, tmp_path, capsys):
    copy = Path(shutil.copytree(photos, tmp_path / "copy", ignore=shutil.ignore_patterns(".vgg-manifest")))
    open_manifest(copy)  # which would leave a file out that is cut already
    whole = (copy / "train/class0/000.JPEG").read_bytes()
    (copy / "train/class0/000.JPEG").write_bytes(whole[: len(whole) // 2])
    assert statistics.main([str(copy)]) == 0
    captured = capsys.readouterr()
    assert "warning: 1 training images cannot be decoded and do not count" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["images"] == 15


def test_those_of_other_images_are_not_used(photos, tmp_path, capsys):
    copy = Path(shutil.copytree(photos, tmp_path / "copy"))
    assert statistics.main([str(copy)]) == 0
    (copy / "train/class0/pixel.png").unlink()
    capsys.readouterr()
    assert find_statistics(open_manifest(copy)) is None
    assert "statistics.json is of other images, and not used" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["/no/such/folder"], [], ["photos", "--fast"]])
def test_what_is_wrong_is_said_in_one_sentence(flags, capsys):
    assert statistics.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def good_statistics() -> dict:
    return {
        "fingerprint": "0" * 32,
        "images": 7,
        "mean_rgb": [120.0, 110.0, 100.0],
        "covariance": [[3000.0, 0.0, 0.0], [0.0, 2000.0, 0.0], [0.0, 0.0, 0.0]],
        "eigenvalues": [3000.0, 2000.0, -1e-9],
        "eigenvectors": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    }


NAN, INFINITY = float("nan"), float("inf")
WRONG: dict[str, dict] = {
    "mean nan": {"mean_rgb": [NAN, 1, 1]},
    "mean infinite": {"mean_rgb": [INFINITY, 1, 1]},
    "mean too large": {"mean_rgb": [256, 1, 1]},
    "mean of two": {"mean_rgb": [1, 1]},
    "mean of words": {"mean_rgb": ["a", "b", "c"]},
    "negative eigenvalue": {"eigenvalues": [3000, 2000, -5]},
    "eigenvalue nan": {"eigenvalues": [NAN, 2000, 0]},
    "eigenvalues not in order": {"eigenvalues": [2000, 3000, 0]},
    "eigenvectors of four": {"eigenvectors": [[1, 0, 0]] * 4},
    "eigenvectors not orthogonal": {"eigenvectors": [[1, 0, 0]] * 3},
    "eigenvectors infinite": {"eigenvectors": [[INFINITY, 0, 0], [0, 1, 0], [0, 0, 1]]},
    "another covariance": {"covariance": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]},
    "covariance nan": {"covariance": [[NAN] * 3] * 3},
    "covariance of one row": {"covariance": [[1, 2, 3]]},
    "no fingerprint": {"fingerprint": None},
    "images": {"images": "many"},
}
DAMAGED = {name: json.dumps({**good_statistics(), **change}).encode() for name, change in WRONG.items()}
DAMAGED |= {
    "empty": b"",
    "binary": b"\x80\xff",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "number": b"1" + b"0" * 5000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_statistics_are_refused_in_a_sentence(photos, tmp_path, content):
    data = dataclasses.replace(open_manifest(photos), folder=tmp_path)
    (tmp_path / STATISTICS).write_bytes(content)
    with pytest.raises(
        UserError, match=r"statistics.json: is damaged; python -m pipeline.statistics computes them anew"
    ):
        find_statistics(data)
    assert (tmp_path / STATISTICS).read_bytes() == content


def test_what_rounding_makes_of_grey_images_is_not_damaged(photos, tmp_path):
    data = dataclasses.replace(open_manifest(photos), folder=tmp_path, fingerprint="0" * 32)
    (tmp_path / STATISTICS).write_text(json.dumps(good_statistics()))
    assert find_statistics(data)
    grey = np.full((20, 20, 3), 17, dtype=np.uint8)
    own = statistics._from_moments(statistics._sums(grey) / (grey.size // 3), images=1, fingerprint="0" * 32)
    statistics.save_statistics(own, tmp_path)
    assert find_statistics(data) == own


def test_statistics_that_cannot_be_opened_are_said_in_a_sentence(photos, tmp_path):
    (tmp_path / STATISTICS).mkdir()
    with pytest.raises(UserError, match=r"statistics.json: cannot be read \(Is a directory\)"):
        find_statistics(dataclasses.replace(open_manifest(photos), folder=tmp_path))


def test_statistics_that_a_bucket_does_not_give_are_not_taken_for_none(photos, tmp_path, monkeypatch):
    """Else the run would go on with ImageNet's mean, and nobody would hear of it."""
    prepared = tmp_path / "prepared"
    assert packing.main([str(photos), str(prepared), "--short-side", "64"]) == 0
    data = open_prepared(str(prepared))
    storage = data.train.storage

    def refuse(*_: object) -> None:
        raise UserError(f"{STATISTICS}: cannot be read (AccessDenied)")

    monkeypatch.setattr(storage, "copy", refuse)
    assert find_statistics(data) is None, "there are none, and nobody asks for them"
    monkeypatch.setattr(storage, "sizes", lambda: {STATISTICS: 900})
    with pytest.raises(UserError, match=r"statistics.json: cannot be read \(AccessDenied\)"):
        find_statistics(data)
