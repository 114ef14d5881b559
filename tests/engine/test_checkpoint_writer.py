"""A checkpoint that is written while the state changes."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn

from common.errors import TrainingError
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint, load
from engine.training import checkpoint_writer
from engine.training.checkpoint_writer import CheckpointWriter
from tests.engine.test_checkpoint import make


class Training:
    """All kinds of state that a training has, on one small network."""

    def __init__(self, momentum: float = 0.9) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=momentum, fused=True)
        self.average = copy.deepcopy(self.model)
        self.history: list[dict] = []
        self.steps = 0

    def step(self) -> None:
        self.model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.load_state_dict(self.model.state_dict())
        self.steps += 1
        self.history.append({"epoch": self.steps, "loss": 0.5, "top1": 0.9, "top5": 1.0, "images": 10})

    def checkpoint(self) -> Checkpoint:
        return dataclasses.replace(
            make(self.steps),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.average.state_dict(),
            history=self.history,
        )


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_file_is_that_of_a_save_in_the_foreground(tmp_path, momentum):
    """To the last byte: what torch notes in a state dict, and the order in memory, too."""
    training, writer = Training(momentum), CheckpointWriter()
    for name in ("foreground", "background"):
        (tmp_path / name).mkdir()
    for _ in range(3):
        training.step()
        checkpoint = training.checkpoint()
        assert checkpoint.model._metadata  # type: ignore[attr-defined]
        checkpoints.save(checkpoint, tmp_path / "foreground", is_best=True, keep=2)
        writer.begin(checkpoint, tmp_path / "background", is_best=True, keep=2)
        writer.finish()
        files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in
                 ("foreground", "background")]  # fmt: skip
        assert files[0] == files[1]
        assert "best.pt" in files[0]


def test_what_changes_meanwhile_is_not_in_it(tmp_path, monkeypatch):
    training, may_write, save = Training(), threading.Event(), torch.save

    def slow(*args):
        assert may_write.wait(60)
        save(*args)

    monkeypatch.setattr(checkpoints.torch, "save", slow)
    training.step()
    expected = load_of(training.checkpoint(), tmp_path, save)
    writer = CheckpointWriter()
    writer.begin(training.checkpoint(), tmp_path, is_best=False, keep=2)
    training.step()
    assert not list(tmp_path.glob("*.pt"))
    may_write.set()
    writer.finish()
    loaded = load(tmp_path / "last.pt")
    assert loaded.history == [training.history[0]]
    for name, weight in loaded.model.items():
        assert torch.equal(weight, expected.model[name])
        assert not torch.equal(weight, training.model.state_dict()[name]), "it has changed since"
        assert loaded.ema
        assert torch.equal(weight, loaded.ema[name])
    for number, state in loaded.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], expected.optimizer["state"][number]["momentum_buffer"])


def load_of(checkpoint: Checkpoint, folder, save) -> Checkpoint:
    """The checkpoint, independent of the tensors that it has now."""
    save({field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}, folder / "now")
    return Checkpoint(**torch.load(folder / "now"))


def test_all_checkpoints_are_copied_into_the_same_memory(tmp_path, monkeypatch):
    places = []

    def noting(checkpoint, *_, **__):
        places.append([tensor.data_ptr() for tensor in checkpoint_writer._tensors_of(vars(checkpoint))])

    monkeypatch.setattr(checkpoints, "save", noting)
    training, writer = Training(), CheckpointWriter()
    for _ in range(3):
        training.step()
        writer.begin(training.checkpoint(), tmp_path, is_best=False, keep=2)
        writer.finish()
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == 2 * 9 + 6, "weights and statistics twice, and momentum"


def test_what_goes_wrong_is_raised_once(tmp_path, monkeypatch):
    writer = CheckpointWriter()
    writer.begin(make(1), tmp_path, is_best=False, keep=2)
    writer.finish()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    writer.begin(make(2), tmp_path, is_best=False, keep=2)
    sentence = r"^cannot write a checkpoint to .* \(No space left on device\); the last good one is .*/last\.pt$"
    with pytest.raises(TrainingError, match=sentence):
        writer.finish()
    assert not writer.has_failed
    writer.finish()
    monkeypatch.undo()
    writer.begin(make(3, weight=float("nan")), tmp_path, is_best=False, keep=2)
    with pytest.raises(TrainingError, match="the weights are not finite any more"):
        writer.finish()
    assert load(tmp_path / "last.pt").steps == 1
    writer.begin(make(4), tmp_path, is_best=False, keep=2)
    writer.finish()
    assert load(tmp_path / "last.pt").steps == 4


def test_behind_the_block_nothing_is_being_written(tmp_path, monkeypatch):
    may_write, save = threading.Event(), checkpoints.save

    def slow(*args, **named):
        assert may_write.wait(60)
        save(*args, **named)

    def fail_while_it_writes() -> None:
        with CheckpointWriter() as writer:
            writer.begin(make(1), tmp_path, is_best=False, keep=2)
            threading.Timer(0.3, may_write.set).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        fail_while_it_writes()
    assert load(tmp_path / "last.pt").steps == 1


@pytest.mark.parametrize("refused_by", ["the machine", "the system"])
def test_without_memory_for_a_copy_it_is_written_at_once_with_one_warning(tmp_path, capsys, monkeypatch, refused_by):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    if refused_by == "the machine":
        monkeypatch.setattr(checkpoint_writer, "available_bytes", lambda: 1000)
    else:
        monkeypatch.setattr(torch, "empty_like", refuse)
    writer = CheckpointWriter()
    for steps in (1, 2):
        writer.begin(make(steps), tmp_path, is_best=False, keep=2)
        assert load(tmp_path / "last.pt").steps == steps
        writer.finish()
    warning = "warning: no memory for a copy of the state (0 MiB): training waits for its checkpoints\n"
    assert capsys.readouterr().err == warning
    with pytest.raises(TrainingError, match="not finite any more"):
        writer.begin(make(3, weight=float("nan")), tmp_path, is_best=False, keep=2)
    monkeypatch.undo()
    writer.begin(make(4), tmp_path, is_best=False, keep=2)
    writer.finish()
    assert load(tmp_path / "last.pt").steps == 4
