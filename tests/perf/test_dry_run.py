"""train.py --dry-run: the figures, and that nothing is written."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from engine.checkpoint import load
from engine.config import parse_args
from engine.data import open_training_data
from engine.monitoring import runlog
from engine.precision import Precision
from engine.training.shared_layers import number_dropout
from model.vgg import VGG
from perf.costs import Job
from perf.dry_run import dry_run, saved_bytes
from perf.peaks import peaks_of
from perf.roofline import roofline
from perf.scaling import links_from, no_link_flags
from tests.engine.test_accuracy import RANKS
from tests.support.launch import SMALL

D_PARAMETERS = 138_357_544  # torchvision's vgg16


def files_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.seconds
def test_it_tells_what_the_run_then_does_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runlog, "draw_curves", lambda _: None)
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--micro-batch", "6", "--epochs", "2", "--out", "out"]
    assert train.main([*flags, "--dry-run"]) == 0
    assert files_in(tmp_path) == {}
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    images = told["train_images"]
    assert told["steps"] == -(-2 * images // 12)
    assert (told["passes"], told["micro_batch"], told["world_size"]) == (2, 6, 1)
    assert (told["floor_seconds"], told["device"], told["steps_done"]) == (None, "CPU", 0)
    assert "time: unknown: the table of cards does not have this device (CPU)\n" in captured.err
    assert f"{told['steps']:,} steps\n" in captured.err
    assert train.main([*flags, "--steps", "1"]) == 0
    assert told["parameters"] == sum(weight.numel() for weight in load(Path("out/last.pt")).model.values())
    assert told["checkpoint_bytes"] == pytest.approx(Path("out/last.pt").stat().st_size, rel=0.01)
    before = files_in(tmp_path)
    capsys.readouterr()
    assert train.main([*SMALL, *flags[-4:], "--dry-run"]) == 0, "in the passes that it had"
    assert files_in(tmp_path) == before
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    assert (told["steps_done"], told["micro_batch"]) == (1, 6)
    assert "from the checkpoint at step 1" in captured.err
    assert train.main([*flags, "--arch", "B", "--dry-run"]) == 2, "as the run would"
    assert "was trained with --arch A" in capsys.readouterr().err
    other = [*flags[:-2], "--out", "other", "--arch", "B", "--weights", "out/last.pt", "--dry-run"]
    assert train.main(other) == 2, "of another network"
    assert "these are the weights of A" in capsys.readouterr().err
    assert not Path("other").exists()


def test_time_and_memory_on_eight_h100(monkeypatch, capsys):
    """Of D with bf16: 256 images in passes of 16 on each rank."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    device = torch.device("cuda", 0)
    ranks = dataclasses.replace(RANKS, world_size=8, local_world_size=8, device=device)
    flags = ["--data", "synthetic", "--batch-size", "2048", "--micro-batch", "16", "--epochs", "3", "--ema", "0.99"]
    config = dataclasses.replace(parse_args(flags), parallel="data")
    data = open_training_data(config, ranks, Precision("bf16", "cuda"))
    job = Job.of(data)
    told = dry_run(config, data, job, None)
    assert told["steps"] == -(-3 * 1_281_167 // 2048)
    peaks = peaks_of("H100", "bf16")
    assert peaks
    links = links_from(no_link_flags(), peaks, ranks_a_machine=8, ranks=8)
    floor = roofline(job, peaks=peaks, links=links).floor_seconds.total
    assert told["floor_step_seconds"] == pytest.approx(floor)
    assert told["floor_seconds"] == pytest.approx(told["steps"] * floor)
    memory = told["memory_bytes"]
    assert told["parameters"] == D_PARAMETERS
    for name in ("weights", "gradients", "momentum", "average"):
        assert memory[name] == 4 * D_PARAMETERS
    # A value of a feature map is kept once, in bf16, by the convolution or the pooling that reads it; indices are int64.
    maps = 2 * 16 * (224**2 * (3 + 2 * 64) + 112**2 * (64 + 2 * 128) + 56**2 * (128 + 3 * 256))
    maps += 2 * 16 * (28**2 * (256 + 3 * 512) + 14**2 * 4 * 512 + 7**2 * 512)
    assert memory["activations"] == saved_bytes(job)
    indices = 8 * 16 * (112**2 * 64 + 56**2 * 128 + 28**2 * 256 + 14**2 * 512 + 7**2 * 512)
    assert memory["activations"] - 2 * D_PARAMETERS == pytest.approx(maps + indices, rel=0.005), (
        "the rest is FC6's to FC8's"
    )
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert told["checkpoint_bytes"] == 3 * 4 * D_PARAMETERS
    said = capsys.readouterr().err
    assert "at least " in said
    assert " steps at most\n" in said, "plateau may end it before"
    shared = dry_run(dataclasses.replace(config, parallel="hybrid"), data, job, None)
    assert shared["sharing"] == 8
    assert shared["parameters"] == D_PARAMETERS
    assert shared["memory_bytes"]["weights"] < memory["weights"] / 3


def test_frozen_blocks_have_no_gradients_no_momentum_and_no_floor(monkeypatch, capsys):
    """D's convolutions: 14,714,688 weights and biases, as torchvision's vgg16().features has."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    ranks = dataclasses.replace(RANKS, device=torch.device("cuda", 0))
    config = parse_args(["--data", "synthetic", "--weights", "a.pt", "--freeze", "features", "--batch-size", "8"])
    data = open_training_data(config, ranks, Precision("bf16", "cuda"))
    told = dry_run(config, data, Job.of(data), None)
    memory = told["memory_bytes"]
    assert told["frozen_parameters"] == 14_714_688
    assert memory["weights"] == 4 * D_PARAMETERS
    assert memory["gradients"] == memory["momentum"] == 4 * (D_PARAMETERS - 14_714_688)
    # FC6 passes no gradient on, so that only FC7 and FC8 keep the copies of their weights.
    copies = 2 * (4096 * 4096 + 4096 * 1000)
    assert memory["activations"] == pytest.approx(copies, rel=0.02)
    assert told["checkpoint_bytes"] == 8 * D_PARAMETERS - 4 * 14_714_688
    assert told["floor_seconds"] is None
    assert "time: unknown: the floor is that of training all layers\n" in capsys.readouterr().err


@pytest.mark.seconds
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("arch", "batch_norm", "fuse"),
    [("A", False, "none"), ("A-LRN", False, "none"), ("D", True, "none"), ("B", False, "pool"), ("B", False, "conv")],
)
def test_saved_bytes_are_what_autograd_saves(arch, batch_norm, fuse, precision):
    """On the CPU, with autocast, of tensors with values: each storage once, and no weights."""
    job = Job(
        arch=arch, classes=10, crop=64, batch=12, micro_batch=6, precision=precision, batch_norm=batch_norm, fuse=fuse
    )
    model = VGG(arch, classes=10, crop=64, batch_norm=batch_norm, fuse=fuse)
    number_dropout(model.modules(), seed=1, device=torch.device("cpu"), shared=None, share=12)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(torch.randn(6, 3, 64, 64))
        loss = F.cross_entropy(logits.float(), torch.zeros(6, dtype=torch.int64))
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert loss.requires_grad
    assert saved_bytes(job) == pytest.approx(total, rel=0.01)
