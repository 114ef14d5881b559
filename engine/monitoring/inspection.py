"""train.py --inspect N: what a training would show its network, as a picture, without training."""

from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.files import replacing
from common.progress import printable
from common.ranks import on_rank_0, ranks_of_this_run
from engine.config import SYNTHETIC, Config
from engine.data import TrainingData, open_training_data
from engine.monitoring.contact_sheet import Tile, draw_sheet, thumbnail_size
from engine.monitoring.pictures import as_pictures
from engine.networks import initial_network
from engine.precision import choose_precision
from pipeline.dali.decoding import decode_whole
from pipeline.dataset.table import FileTable
from pipeline.plan.samples import LOST_LABEL, Samples
from pipeline.plan.training import TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.shards.shard_table import ShardTable

SHEET = "inspect.png"


def inspect(config: Config) -> dict:
    """Write OUT/inspect.png: the first config.inspect training samples of a new run, and as many validation images.

    The images come through the run's own plan and loader. Nothing else in OUT changes. Returns the results, on every rank.
    Raises UserError, TrainingError.
    """
    count = config.inspect
    assert count
    if config.data == SYNTHETIC:
        raise UserError("--inspect: synthetic data are noise; give --data a data set")
    with ranks_of_this_run(config.device) as ranks:
        precision = choose_precision(config.precision, ranks)
        data = open_training_data(config, ranks, precision, initial=initial_network(config))
        return on_rank_0(ranks, lambda: _write(data, count, config.out))


def _write(data: TrainingData, count: int, out: Path) -> dict:
    config = data.config
    assert data.manifest
    train, val = data.train_plan(), data.validation_plan(data.viewing)
    # Spread over the set, whose rows are sorted by class.
    rows = np.linspace(0, len(val.table) - 1, min(count, len(val.table))).round().astype(np.int64)
    tiles = (
        _training_tiles(data, data.manifest.train, train, np.arange(count)),
        _validation_tiles(data, data.manifest.val, val, rows),
    )
    headings = (
        f"Training: the first {count} samples of --seed {config.seed}. Left the source and the crop's window, right what "
        f"the network sees: {config.crop}×{config.crop} pixels, {config.crops}.",
        f"Validation: {len(rows)} of {len(val.table):,} images, rescaled to S = {val.scale}, centre crop.",
    )
    sheet = draw_sheet(list(zip(headings, tiles, strict=True)))
    path = out / SHEET
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    return {"inspect": str(path), "training_samples": count, "validation_images": len(rows), "stopped": False}


def _training_tiles(
    data: TrainingData, table: FileTable | ShardTable, plan: TrainPlan, numbers: np.ndarray
) -> list[Tile]:
    images, samples = data.look(plan, numbers)
    epochs, planned = plan.epochs_and_rows(numbers)
    shifts = np.asarray(data.mean_rgb) - samples.mean
    if plan.random_resized:
        shares = samples.shape.prod(axis=1) / table.read(samples.rows).sizes.prod(axis=1)
        crops = [f"{share:.0%} of the area" for share in shares]
    else:
        crops = [f"S {scale}" for scale in plan.scales(numbers)]
    captions = []
    for index, number in enumerate(numbers.tolist()):
        instead = "" if planned[index] == samples.rows[index] else f", instead of image {planned[index]}"
        captions.append(
            (
                f"{number}: {_name(data, samples.labels[index])}, image {samples.rows[index]}{instead}, epoch {epochs[index]}",
                f"{crops[index]}, {'flipped' if samples.flipped[index] else 'not flipped'}, colour shift "
                + " ".join(f"{value:+.1f}".replace("-", "−") for value in shifts[index].tolist()),
            )
        )
    return _tiles(data, table, samples, images, captions)


def _validation_tiles(
    data: TrainingData, table: FileTable | ShardTable, plan: ValidationPlan, rows: np.ndarray
) -> list[Tile]:
    crops, samples = data.look(plan, rows)
    captions = [
        (f"{_name(data, label)}, image {row}", f"S {plan.scale}, centre")
        for row, label in zip(rows, samples.labels, strict=True)
    ]
    return _tiles(data, table, samples, crops, captions)


def _name(data: TrainingData, label: int) -> str:
    return "cannot be decoded: another in its place" if label == LOST_LABEL else printable(data.classes[label])


def _tiles(
    data: TrainingData, table: FileTable | ShardTable, samples: Samples, crops: Tensor, captions: list[tuple[str, str]]
) -> list[Tile]:
    sizes = table.read(samples.rows).sizes
    thumbnails = np.array([thumbnail_size(height, width, data.config.crop) for height, width in sizes.tolist()])
    sources = decode_whole(table, samples.rows, sizes=thumbnails, threads=data.threads)
    ends = np.stack((samples.roi_start, samples.roi_end)) + samples.start
    windows = np.concatenate((ends.min(axis=0), ends.max(axis=0)), axis=1)  # top, left, bottom, right in source pixels
    tiles = []
    for index, (source, _) in enumerate(sources):
        top, left, bottom, right = windows[index].tolist()
        height, width = sizes[index].tolist()
        where = f"y {top:.0f} to {bottom:.0f}, x {left:.0f} to {right:.0f} of {height}×{width}"
        tiles.append(
            Tile(
                source=source,
                window=(top / height, left / width, bottom / height, right / width),
                crop=as_pictures(crops[index : index + 1], data.mean_rgb, data.config.std_rgb)[0],
                caption=(*captions[index], where),
            )
        )
    return tiles
