"""Whole images: what comes out is what PIL decodes, whatever the batches and threads, and bad files do not disturb others."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from pipeline.dali import decoding
from pipeline.dali.decoding import decode_whole
from pipeline.dataset.manifest import open_manifest
from tests.support.images import photo_folder, photographs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = photo_folder(tmp_path_factory.mktemp("data") / "photos", train=20, val=2)
    photo = photographs()[0].resize((301, 233))
    for mode in ("RGB", "L", "P", "RGBA"):
        photo.convert(mode).save(folder / f"train/class0/{mode}.png")
    photo.save(folder / "train/class1/bitmap.JPEG", "BMP")
    photo.resize((1, 700)).save(folder / "train/class1/narrow.JPEG")
    photo.resize((1, 1)).save(folder / "train/class1/pixel.JPEG")
    photo.save(folder / "train/class1/progressive.JPEG", progressive=True)
    return folder


@pytest.fixture(scope="module")
def table(folder):
    return open_manifest(folder).train


def paths(table, rows) -> list[Path]:
    return [Path(os.path.normpath(bytes(name).decode())) for name in table.read(rows).source]


def decoded(table, rows, **arguments) -> list[np.ndarray]:
    results = list(decode_whole(table, rows, **{"threads": 2, **arguments}))
    assert all(reason == "" for _, reason in results)
    return [image for image, _ in results if image is not None]


def test_images_are_pils_bit_by_bit_in_the_order_asked_for(table):
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(table)), 2))
    images = decoded(table, rows)
    for path, image in zip(paths(table, rows), images, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB"))), path


def test_resized_images_are_torchvisions_within_a_few_levels(table):
    rows = np.arange(len(table))
    own = table.read(rows).sizes
    sizes = np.maximum((own * np.linspace(0.3, 1.6, len(rows))[:, None]).astype(np.int64), 1)
    wholes, images = decoded(table, rows), decoded(table, rows, sizes=sizes)
    for whole, image, size in zip(wholes, images, sizes.tolist(), strict=True):
        reference = functional.resize(torch.from_numpy(whole).permute(2, 0, 1), size, antialias=True)
        difference = np.abs(image.astype(int) - reference.permute(1, 2, 0).numpy())
        assert image.shape == (*size, 3)
        assert difference[1:-1, 1:-1].max(initial=0) <= 2
        # Beyond the border DALI's filter sees the outermost pixel again, torchvision's and PIL's see nothing.
        assert difference.max() <= 16
        assert difference.mean() < 0.3


def test_an_image_of_the_wanted_size_is_not_touched_though_others_are_resized(table):
    rows = np.arange(len(table))
    sizes = table.read(rows).sizes
    sizes[::2] //= 3
    sizes = np.maximum(sizes, 1)
    for whole, image in list(zip(decoded(table, rows), decoded(table, rows, sizes=sizes), strict=True))[1::2]:
        assert np.array_equal(whole, image)


def test_neither_threads_nor_batches_change_a_bit(table, monkeypatch):
    rows = np.arange(len(table))
    sizes = table.read(rows).sizes // 2 + 1
    expected = decoded(table, rows, sizes=sizes, threads=1)
    for threads, least, pixels, block in ((3, 5, 1 << 25, 4096), (2, 1, 1, 7), (1, 32, 500_000, 4096)):
        monkeypatch.setattr(decoding, "_LEAST_IMAGES", least)
        monkeypatch.setattr(decoding, "_IMAGES_A_THREAD", 1)
        monkeypatch.setattr(decoding, "_PIXELS_A_BATCH", pixels)
        monkeypatch.setattr(decoding, "_ROWS_A_BLOCK", block)
        for one, other in zip(expected, decoded(table, rows, sizes=sizes, threads=threads), strict=True):
            assert np.array_equal(one, other)


def test_batches_hold_few_images_and_few_pixels_and_every_row_once(table, monkeypatch):
    monkeypatch.setattr(decoding, "_PIXELS_A_BATCH", 400_000)
    monkeypatch.setattr(decoding, "_ROWS_A_BLOCK", 9)
    rows = np.arange(len(table))[::-1]
    batches = list(decoding._batches(table, rows, None, None, 6))
    assert np.array_equal(np.concatenate([batch.source for batch in batches]), table.read(rows).source)
    for batch in batches:
        assert 1 <= len(batch.source) <= 6
        assert len(batch.source) == 1 or 2 * batch.sizes.prod(axis=1).sum() <= 400_000


def test_arrays_can_be_kept(table):
    rows = np.arange(len(table))
    kept = decoded(table, rows)
    copies = [image.copy() for image in kept]
    decoded(table, rows)
    assert all(np.array_equal(one, other) for one, other in zip(kept, copies, strict=True))


DAMAGE = {
    "emptied": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 30),
    "removed": lambda path: path.unlink(),
    "a smaller image": lambda path: Image.new("RGB", (9, 9)).save(path),
    "a larger image": lambda path: Image.new("RGB", (900, 900)).save(path),
}


@pytest.mark.parametrize("least", [3, 32])
def test_files_damaged_after_the_scan_have_a_reason_and_the_others_are_as_before(tmp_path, monkeypatch, least):
    monkeypatch.setattr(decoding, "_LEAST_IMAGES", least)
    monkeypatch.setattr(decoding, "_IMAGES_A_THREAD", 1)
    folder = photo_folder(tmp_path, train=26, val=2)
    table = open_manifest(folder).train
    rows = np.arange(len(table))
    before = decoded(table, rows)
    victims = [0, 1, 5, 12, 13, 25]  # the first, two together, the last
    for row, damage in zip(victims, DAMAGE.values(), strict=True):
        damage(paths(table, rows)[row])
    results = list(decode_whole(table, rows, threads=2))
    assert [row for row, (image, _) in enumerate(results) if image is None] == victims
    for row, (image, reason) in enumerate(results):
        assert bool(reason) == (row in victims)
        if image is not None:
            assert np.array_equal(image, before[row])
    for row in (13, 25):
        assert "changed to another size since the scan" in results[row][1]


def test_no_rows_no_images(table):
    assert list(decode_whole(table, np.arange(0), threads=2)) == []
