"""train.py --inspect: what stands under each sample is what the plan decided, and its crop is what the network gets."""

import json

import numpy as np
import pytest
from PIL import Image

import train
from common.ranks import ranks_of_this_run
from engine.config import parse_args
from engine.data import open_training_data
from engine.monitoring.contact_sheet import Tile, draw_sheet, thumbnail_size
from engine.monitoring.inspection import _training_tiles, _validation_tiles, inspect
from engine.precision import Precision
from pipeline.plan import random_numbers
from tests.support.images import photo_folder


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = photo_folder(tmp_path_factory.mktemp("photos"))
    return ["--data", str(folder), "--crop", "64", "--train-scale", "80-160", "--batch-size", "4"]


@pytest.fixture(scope="module")
def data(flags):
    with ranks_of_this_run("cpu") as ranks:
        yield open_training_data(parse_args(flags), ranks, Precision("fp32", "cpu"))


def test_training_tiles_say_what_the_plan_decided(data):
    plan, numbers = data.train_plan(), np.arange(12)  # two epochs of six
    tiles = _training_tiles(data, data.manifest.train, plan, numbers)
    samples = plan.samples(numbers)
    epochs, rows = plan.epochs_and_rows(numbers)
    u = random_numbers.uniforms(0, epochs, rows, random_numbers.PURPOSE_GEOMETRY)
    for index, tile in enumerate(tiles):
        path = data.manifest.train.path(rows[index])
        assert tile.source is not None
        first, second, third = tile.caption
        assert first == f"{index}: {path.parent.name}, image {rows[index]}, epoch {index // 6}"
        scale = 80 + int(u[0, index] * 81)
        shift = " ".join(f"{v:+.1f}".replace("-", "−") for v in np.asarray(data.mean_rgb) - samples.mean[index])
        flipped = u[3, index] >= 0.5
        assert second == f"S {scale}, {'flipped' if flipped else 'not flipped'}, colour shift {shift}"
        with Image.open(path) as image:
            width, height = image.size
            source = np.asarray(image.convert("RGB").resize(tile.source.shape[1::-1], Image.Resampling.BILINEAR))
        assert third.endswith(f" of {height}×{width}")
        if image.mode == "CMYK":
            continue  # PIL's colours are others
        assert np.abs(tile.source.astype(int) - source).mean() < 2  # the image that the caption names
        # The crop, undone: the window of the same image, up to the resize and the colour shift.
        top, left, bottom, right = (
            round(share * side) for share, side in zip(tile.window, 2 * tile.source.shape[:2], strict=True)
        )
        assert bottom - top == pytest.approx(64 * tile.source.shape[0] / height * min(height, width) / scale, abs=1)
        window = Image.fromarray(tile.source[top:bottom, left:right]).resize((8, 8), Image.Resampling.BOX)
        crop = Image.fromarray(tile.crop[:, ::-1] if flipped else tile.crop).resize((8, 8), Image.Resampling.BOX)
        difference = np.asarray(crop).astype(float) - np.asarray(window)
        assert np.abs(difference - difference.mean(axis=(0, 1))).mean() < 8
    assert {caption.split(",")[1] for caption in (tile.caption[1] for tile in tiles)} == {" flipped", " not flipped"}


def test_of_random_resized_crops_the_share_of_the_image_is_told(flags):
    own = [*flags, "--train-scale", "256", "--crop-mode", "random-resized"]
    with ranks_of_this_run("cpu") as ranks:
        data = open_training_data(parse_args(own), ranks, Precision("fp32", "cpu"))
        assert data.manifest
        plan, numbers = data.train_plan(), np.arange(6)
        tiles = _training_tiles(data, data.manifest.train, plan, numbers)
    for tile in tiles:
        top, left, bottom, right = tile.window
        assert tile.caption[1].startswith(f"{(bottom - top) * (right - left):.0%} of the area, ")


def test_validation_tiles_are_the_centre(data):
    tiles = _validation_tiles(data, data.manifest.val, data.validation_plan(data.viewing), np.array([0, 2]))
    assert [tile.caption[1] for tile in tiles] == ["S 120, centre"] * 2
    for tile in tiles:
        top, left, bottom, right = tile.window
        assert top + bottom == pytest.approx(1, abs=0.02)
        assert left + right == pytest.approx(1, abs=0.02)


def test_the_command_writes_a_picture_and_nothing_else(flags, tmp_path, capsys):
    out = tmp_path / "new/run"
    assert train.main([*flags, "--arch", "A", "--inspect", "3", "--out", str(out)]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == {
        "inspect": str(out / "inspect.png"),
        "training_samples": 3,
        "validation_images": 3,
        "stopped": False,
    }
    assert [path.name for path in out.iterdir()] == ["inspect.png"]
    with Image.open(out / "inspect.png") as sheet:
        assert min(sheet.size) > 2 * 192


def test_a_broken_image_is_replaced_and_said(flags, tmp_path):
    folder = photo_folder(tmp_path / "photos")
    victim = sorted((folder / "train").rglob("*.JPEG"))[0]
    config = parse_args(
        [*flags, "--data", str(folder), "--out", str(tmp_path / "out"), "--inspect", "6", "--max-bad-images", "2"]
    )
    inspect(config)  # scans the folder
    victim.write_bytes(bytes(victim.stat().st_size))
    with ranks_of_this_run("cpu") as ranks:
        data = open_training_data(config, ranks, Precision("fp32", "cpu"))
        assert data.manifest
        captions = [
            tile.caption[0] for tile in _training_tiles(data, data.manifest.train, data.train_plan(), np.arange(6))
        ]
    assert sum("instead of image 0" in caption for caption in captions) == 1
    assert not any("image 0," in caption.replace("instead of image 0,", "") for caption in captions)


def test_synthetic_data_cannot_be_looked_at(capsys):
    assert train.main(["--data", "synthetic", "--inspect", "4"]) == 2
    assert "--inspect: synthetic data are noise" in capsys.readouterr().err


def test_a_sheet_of_large_and_small_crops():
    large = Tile(
        source=np.zeros((100, 200, 3), dtype=np.uint8),
        window=(0, 0, 1, 1),
        crop=np.zeros((224, 224, 3), dtype=np.uint8),
        caption=["a name that is far longer than there is room for " * 5, "二"],
    )
    lost = Tile(source=None, window=(0, 0, 1, 1), crop=large.crop, caption=["", ""])
    assert draw_sheet([("heading", [large, lost]), ("other", [large])]).size[0] > 2 * 2 * 224
    assert thumbnail_size(500, 1000, 224) == (112, 224)
    assert thumbnail_size(36, 36, 32) == (36, 36)
    assert thumbnail_size(1, 10_000, 224) == (1, 224)
