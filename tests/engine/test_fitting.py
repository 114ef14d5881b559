"""Memory that does not suffice for a rank's share of the batch."""

import gc
import weakref
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import engine.training.assembly
import engine.training.resume
import train
from engine.checkpoint import load
from engine.config import parse_args
from engine.data import open_training_data
from engine.monitoring import runlog
from engine.precision import Precision
from engine.training import fitting
from engine.training.fitting import halve_until_it_fits
from engine.training.step import TrainStep
from tests.engine.test_accuracy import RANKS
from tests.engine.test_trainer import network_of
from tests.support.launch import SMALL, assert_same_weights, results_of, run

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Limited(nn.Module):
    """Runs out of memory in training with more than so many images. Notes how many it was given, and what it has made of them."""

    def __init__(self, images: int, error: Exception = FULL) -> None:
        super().__init__()
        self.images, self.error, self.sizes, self.made = images, error, [], []  # type: ignore[var-annotated]

    def forward(self, x):
        if not self.training:
            return x
        self.sizes.append(len(x))
        y = x * 2
        self.made.append(weakref.ref(y))
        if len(x) > self.images:
            raise type(self.error)(*self.error.args)  # a new one: an error holds the frames that it came through
        return y


def limit_networks(monkeypatch, images: int, error: Exception = FULL, *, place: int = 0) -> list[Limited]:
    """Every network of these tests, from now on; returns the limits of those that were made. place: among the layers."""
    made: list[Limited] = []

    def limited_network_of(config, *, classes, device):
        network = network_of(config, classes=classes, device=device)
        made.append(Limited(images, error))
        return network.insert(place, made[-1])

    monkeypatch.setattr(engine.training.assembly, "network_of", limited_network_of)
    monkeypatch.setattr(engine.training.resume, "check_weights", lambda *_: None)  # it is no VGG
    monkeypatch.setattr(fitting, "TRIED_ON", ("cpu",))
    return made


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    """Without the pictures, which take seconds."""
    monkeypatch.setattr(runlog, "draw_curves", lambda _: None)


def said_by_halving(text: str) -> list[str]:
    return [line for line in text.splitlines() if "does not suffice" in line]


@pytest.mark.seconds
def test_a_run_halves_its_passes_as_if_micro_batch_had_been_given(tmp_path, monkeypatch, capsys):
    """And goes on with them, bit-exactly, when it is resumed; batch normalisation's statistics are those of a pass."""
    flags = [*SMALL, "--ema", "0.9", "--out"]
    limit_networks(monkeypatch, 12)
    given = [*flags, str(tmp_path / "given"), "--micro-batch", "6", "--steps", "2"]
    assert train.main(given) == 0
    assert not said_by_halving(capsys.readouterr().err)
    limits = limit_networks(monkeypatch, 7)
    halved = [*flags, str(tmp_path / "halved")]
    assert train.main([*halved, "--steps", "1"]) == 0
    assert limits[0].sizes[0] == 12
    assert set(limits[0].sizes[1:]) == {6}
    captured = capsys.readouterr()
    assert said_by_halving(captured.err) == [
        "the memory does not suffice for 12 images at a time: going on as with --micro-batch 6, which accumulates gradients over "
        "2 passes"
    ]
    assert "1 ranks × 2 passes × 6 images" in captured.err
    assert yaml.safe_load((tmp_path / "halved/config.yaml").read_text())["micro_batch"] == 6
    assert load(tmp_path / "halved/last.pt").config["micro_batch"] == 6
    assert train.main([*halved, "--steps", "2"]) == 0
    captured = capsys.readouterr()
    assert "--micro-batch 6, as until now" in captured.err
    assert not said_by_halving(captured.err)
    assert set(limits[1].sizes) == {6}
    assert yaml.safe_load((tmp_path / "halved/config.yaml").read_text())["micro_batch"] == 6
    assert_same_weights(tmp_path / "given/last.pt", tmp_path / "halved/last.pt")
    limits = limit_networks(monkeypatch, 3)  # on a smaller GPU
    assert train.main([*halved, "--steps", "3"]) == 0
    assert limits[0].sizes[:2] == [6, 3]
    assert train.main([*halved, "--steps", "4", "--micro-batch", "4"]) == 1, "as it was given"
    assert "halve it with --micro-batch 2 " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [FULL, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]
)
def test_where_not_even_one_image_fits_nothing_is_touched(tmp_path, monkeypatch, capsys, error):
    limits = limit_networks(monkeypatch, 0, error)
    assert train.main([*SMALL, "--out", str(tmp_path / "out")]) == 1
    assert limits[0].sizes == [12, 6, 3, 1]
    assert "too small even for one image at a time" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_that_are_mixed_need_another_in_their_pass(tmp_path, monkeypatch, capsys):
    limits = limit_networks(monkeypatch, 2)
    assert train.main([*SMALL, "--mixup", "0.2", "--out", str(tmp_path / "out")]) == 1
    assert limits[0].sizes == [12, 6, 3]
    said = capsys.readouterr().err
    assert "the GPU's memory is too small for 3 images at a time, and --mixup and --cutmix need two or more" in said
    assert not (tmp_path / "out").exists()


def test_other_errors_are_no_lack_of_memory(tmp_path, monkeypatch):
    limit_networks(monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        train.main([*SMALL, "--out", str(tmp_path / "out")])


def test_a_trial_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither the activations of one that failed, on which an error may hold fast, nor gradients, nor new statistics."""
    limits = limit_networks(monkeypatch, 5, place=3)  # behind batch normalisation
    config = parse_args([*SMALL, "--batch-norm", "--out", str(tmp_path)])
    data = open_training_data(config, RANKS, Precision("fp32", "cpu"))
    network: Any = engine.training.assembly.network_of(config, classes=10, device=RANKS.device)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.setattr(gc, "collect", lambda: 0)  # the cycles are none
    fitted = halve_until_it_fits(data, network)
    assert (fitted.micro_batch, fitted.config.micro_batch, data.micro_batch) == (3, 3, 12)
    assert limits[0].sizes == [12, 6, 3]
    assert [made() for made in limits[0].made] == [None] * 3
    assert all(parameter.grad is None for parameter in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_on_a_cpu_and_with_micro_batch_nothing_is_tried(tmp_path, monkeypatch):
    tried = []
    warm_up = TrainStep.warm_up

    def noting(self, images, labels):
        tried.append(len(images))
        warm_up(self, images, labels)

    monkeypatch.setattr(TrainStep, "warm_up", noting)
    limit_networks(monkeypatch, 12)
    assert train.main([*SMALL, "--steps", "1", "--micro-batch", "4", "--out", str(tmp_path / "given")]) == 0
    monkeypatch.setattr(fitting, "TRIED_ON", ("cuda",))
    assert train.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "cpu")]) == 0
    assert tried == [4, 12], "the runs' own"


TWO_RANKS = """
import os
from common.process import end
import engine.training.assembly, engine.training.resume, train
from engine.training import fitting
from tests.engine.test_fitting import FULL, Limited
from tests.engine.test_trainer import network_of

def limited_network_of(config, **others):
    return network_of(config, **others).insert(0, Limited(4 if os.environ["RANK"] == "1" else 6))

engine.training.assembly.network_of = limited_network_of
engine.training.resume.check_weights = lambda *_: None
fitting.TRIED_ON = ("cpu",)
end(train.main)
"""


@pytest.mark.seconds
def test_where_one_rank_runs_out_of_memory_all_ranks_halve_and_none_waits(tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(TWO_RANKS)
    done = run(*SMALL, "--steps", "2", "--out", str(tmp_path / "out"), ranks=2, script=str(script))
    assert results_of(done)["steps"] == 2
    assert "2 ranks × 2 passes × 3 images" in done.stderr
    assert len(said_by_halving(done.stderr)) == 1
    assert load(tmp_path / "out/last.pt").config["micro_batch"] == 3


def test_the_share_decides_what_half_is(tmp_path):
    config = parse_args(["--data", "digits", "--batch-size", "30"])
    data = open_training_data(config, RANKS, Precision("fp32", "cpu"))
    sizes = []
    while data.micro_batch > 1:
        data = data.halved()
        sizes.append(data.micro_batch)
    assert sizes == [15, 6, 3, 1]
    images, labels = data.blank_batch()
    assert (images.shape, labels.shape) == ((1, 3, 32, 32), (1,))
