"""Where the configuration meets the loaders: batch sizes, and which of DALI's decoders takes part."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import TrainingError, UserError
from common.ranks import Ranks
from engine.config import Config, parse_args
from engine.data import TrainingData, Viewing, default_threads, open_data, open_training_data
from engine.evaluation import prediction
from engine.evaluation.flags import parse_evaluate
from engine.networks import Network
from engine.precision import Precision
from pipeline.dali import opening
from pipeline.dali.loader import DaliLoader
from pipeline.dali.lost_images import LostImages
from pipeline.dataset.digits import digits_folder
from pipeline.dataset.manifest import open_manifest
from tests.engine.test_accuracy import RANKS

FP32 = Precision("fp32", "cpu")


def ranks_of(world_size: int) -> Ranks:
    """The first of so many ranks, which do not talk to each other."""
    return dataclasses.replace(RANKS, world_size=world_size, local_world_size=world_size)


def data_of(config: Config, world_size: int = 1) -> TrainingData:
    return open_training_data(config, ranks_of(world_size), FP32)


class Stop(Exception):
    """Instead of a loader."""


def loads(monkeypatch, module) -> list[float]:
    """What the loaders that a module makes from now on are told to give to the JPEG engine."""
    seen: list[float] = []

    def loader(batches_after, options, **_):
        seen.append(options.hw_decoder_load)
        raise Stop

    monkeypatch.setattr(module, "DaliLoader", loader)
    return seen


@pytest.mark.parametrize(
    ("flags", "training", "elsewhere"),
    [
        ([], 0.65, 0),
        (["--deterministic"], 0, 0),
        (["--hw-decoder-load", "1"], 1, 1),
        (["--hw-decoder-load", "0"], 0, 0),
    ],
)
def test_the_jpeg_engine_takes_part_of_a_batch_in_training_alone(monkeypatch, flags, training, elsewhere):
    """Where it decodes a share, an image's pixels depend on the others of its batch, and so on the ranks."""
    data = data_of(parse_args(["--arch", "A", "--data", "digits", *flags]))
    seen = loads(monkeypatch, opening)
    for make in (
        lambda: data.train_batches(0),
        lambda: data.validation_batches(data.viewing),
        lambda: data.whole_batches(data.viewing, "val"),
        lambda: data.whole_batches(data.viewing, "train"),
        lambda: data.look(data.validation_plan(data.viewing), np.arange(2)),
        lambda: data.look(data.train_plan(), np.arange(2)),
    ):
        with pytest.raises(Stop):
            make()
    assert seen == [training] + [elsewhere] * 5


@pytest.mark.parametrize(
    ("device", "flags", "training", "elsewhere"),
    [
        ("cuda", ["--decoder", "split"], "split", "gpu"),
        ("cuda", ["--decoder", "split", "--deterministic"], "gpu", "gpu"),
        ("cuda", ["--decoder", "auto"], "gpu", "gpu"),
        ("cuda", ["--decoder", "cpu"], "cpu", "cpu"),
        ("cpu", ["--decoder", "auto"], "cpu", "cpu"),
    ],
)
def test_two_decoders_share_batches_in_training_alone(device, flags, training, elsewhere):
    """Which of them has an image depends on its place in the batch, and so on the ranks."""
    ranks = dataclasses.replace(RANKS, device=torch.device(device, 0) if device == "cuda" else torch.device(device))
    data = open_training_data(parse_args(["--arch", "A", "--data", "digits", *flags]), ranks, FP32)
    assert (data.decoder, data.train_options.decoder) == (training, training)
    assert data._options(32, (1.0, 1.0, 1.0), False).decoder == elsewhere
    assert data.threads == default_threads(ranks.cpu_share, training)


def test_the_cpus_share_begins_with_what_its_cores_can_do(monkeypatch):
    data = data_of(parse_args(["--arch", "A", "--data", "digits"]))
    for cores, share in ((1, 1 / 12), (6, 0.5), (12, 1.0), (64, 1.0)):
        monkeypatch.setattr("common.ranks.usable_cores", lambda cores=cores: cores)
        assert data.first_share == share
        loader = data.train_batches(0)
        assert isinstance(loader, DaliLoader)
        assert loader.share == share


def test_nor_does_an_answer_of_predict_depend_on_the_other_images(monkeypatch):
    seen = loads(monkeypatch, prediction)
    network = Network(
        name="", arch="A", batch_norm=False, crop=32, classes=("a",), mean_rgb=(0, 0, 0), train_scale=None, state={}
    )
    image = open_manifest(digits_folder()).val.path(0)
    with pytest.raises(Stop):
        prediction.predict(network, [image], top=1, scale=36, device=torch.device("cpu"), precision=FP32, threads=1)
    assert seen == [0]


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_rank_tests_at_most_batch_size_images_at_a_time(world_size):
    flags = parse_evaluate(["--checkpoint", "x.pt", "--data", "digits", "--batch-size", "16"])
    data = open_data(flags.data, ranks_of(world_size), FP32, flags.loading, max_bad_images=None)
    opened = data.validation_batches(
        Viewing(crop=32, scale=36, mean_rgb=(0, 0, 0), std_rgb=(1, 1, 1), batch_size=flags.batch_size)
    )
    assert opened
    batches, steps = opened
    assert len(next(batches)[0]) == 16
    assert steps == -(-360 // (16 * world_size))


def test_small_passes_are_warned_of_with_batches_that_do_better(capsys):
    flags = ["--arch", "A", "--data", "digits", "--micro-batch", "32", "--batch-size"]
    assert data_of(parse_args([*flags, "296"]), 8).micro_batch == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == (
        "warning: --micro-batch 32: a rank's 37 images divide into passes of 1 at most; "
        "--batch-size 256 or 512 makes passes of 32"
    )
    for better in ("256", "512"):
        assert data_of(parse_args([*flags, better]), 8).micro_batch == 32
    assert data_of(parse_args([*flags, "384"]), 8).micro_batch == 24, "more than half"
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--batch-size", "8"], ["--batch-size", "296", "--micro-batch", "32"]])
def test_passes_of_one_image_have_nothing_to_mix(flags):
    for mixing in ("--mixup", "--cutmix"):
        with pytest.raises(UserError, match="mix the images of one pass, which has only one here"):
            data_of(parse_args(["--arch", "A", "--data", "digits", *flags, mixing, "0.2"]), 8)


@pytest.mark.parametrize(
    ("flag", "images", "limit"),
    [
        (None, 1_281_167, 1282),  # a thousandth, rounded up
        (None, 1000, 1),
        (None, 1001, 2),
        (None, 10, 1),
        (None, 1, 0),  # one is left in any case
        (0, 5000, 0),
        (7, 5000, 7),
        (7, 7, 6),
    ],
)
def test_a_thousandth_of_the_images_may_be_lost_unless_a_flag_says_otherwise(flag, images, limit):
    manifest: Any = SimpleNamespace(train=range(images), folder=Path("folder"))
    lost = LostImages(manifest=manifest, split="train", max_bad_images=flag)
    assert lost.limit == limit
    lost.check(limit)
    with pytest.raises(TrainingError, match=rf"^{limit + 1} images .* more than the {limit} that --max-bad-images"):
        lost.check(limit + 1)
