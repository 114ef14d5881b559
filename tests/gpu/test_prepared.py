"""Prepared data on the GPU: images that are cut before they are decoded, and cropped to the last pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.plan.training import TrainPlan
from pipeline.preparation import packing
from pipeline.shards.index import open_prepared
from pipeline.shards.reader import ShardReader
from pipeline.shards.shard_table import ShardTable
from tests.gpu.device import DECODERS_DIFFER_BY, DECODERS_DIFFER_ON_AVERAGE_BY, DEVICE
from tests.support.images import photographs

pytestmark = pytest.mark.gpu

IMAGES = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 1)):
        (root / split / "class").mkdir(parents=True)
        for number in range(count):
            width, height = (int(side) for side in generator.integers(240, 700, size=2))
            photographs()[number % 2].resize((width, height)).save(root / split / f"class/{number}.JPEG", quality=92)
    return root


@pytest.fixture(scope="module")
def plan(photos, tmp_path_factory) -> TrainPlan:
    return plan_of(photos, tmp_path_factory.mktemp("prepared") / "256")


def plan_of(photos: Path, folder: Path, *flags: str) -> TrainPlan:
    assert packing.main([str(photos), str(folder), "--short-side", "256", *flags]) == 0
    table = open_prepared(str(folder)).train
    return TrainPlan(table=table, batch_size=IMAGES, crop=224, scale=(256, 256), seed=0)


def batch_on(plan: TrainPlan, device: torch.device, decoder: str) -> torch.Tensor:
    assert isinstance(plan.table, ShardTable)
    reader = ShardReader(plan.table, threads=2, batches_ahead=2)
    loader = DaliLoader(
        lambda skip: plan.batches(start=0, rank=0, world_size=1, micro_batch=IMAGES, skip=skip),
        GraphOptions(crop=224, device_id=device.index, decoder=decoder, threads=2),
        lose=lambda lost, dead, reasons: pytest.fail(f"cannot be decoded: {reasons}"),
        batch_size=IMAGES,
        fetch=reader.fetch,
    )
    return next(loader)[0].cpu()


def test_images_are_the_cpus_as_far_as_decoders_agree(plan):
    difference = (batch_on(plan, torch.device("cpu"), "cpu") - batch_on(plan, DEVICE, "gpu")).abs()
    assert difference.max() < DECODERS_DIFFER_BY
    assert difference.mean(dim=(1, 2, 3)).max() < DECODERS_DIFFER_ON_AVERAGE_BY


def test_with_the_cpus_decoder_only_the_resize_rounds_otherwise(plan):
    difference = (batch_on(plan, torch.device("cpu"), "cpu") - batch_on(plan, DEVICE, "cpu")).abs()
    resized = plan.samples(np.arange(IMAGES)).resized
    assert difference[~torch.from_numpy(resized)].max() < 1e-3
    assert difference.max() < 1 + 1e-3


def test_images_that_are_kept_as_pixels_come_through_unchanged(photos, tmp_path):
    plan = plan_of(photos, tmp_path / "raw", "--format", "raw")
    difference = (batch_on(plan, torch.device("cpu"), "none") - batch_on(plan, DEVICE, "none")).abs()
    resized = plan.samples(np.arange(IMAGES)).resized
    assert difference[~torch.from_numpy(resized)].max() < 1e-3
    assert difference.max() < 1 + 1e-3
