"""Mean and covariance of a data set's colours, against PIL and NumPy."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import prepare, statistics
from pipeline.manifest import open_manifest
from pipeline.plan import IMAGENET_COLOUR_SHIFT
from pipeline.prepared import open_prepared
from pipeline.statistics import STATISTICS, Statistics, find_statistics
from tests.images import photo_folder


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
    assert prepare.main([str(photos), str(prepared), "--short-side", "64", "--shard-images", "4"]) == 0
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
