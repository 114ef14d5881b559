"""The training loop itself, whole runs of train.py in this process: where the host waits, and what memory does."""

import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch

import train
from engine import checkpoint as checkpoints
from engine.checkpoint import load
from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.step import TrainStep
from tests.engine.test_checkpoint import make
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu

# On the digits an epoch has 44 steps of 32, so that no validation lies within the first 40.
FLAGS = ["--arch", "A", "--data", "digits", "--device", "cuda", "--log-every", "1000"]
MOST_GROWTH_BYTES = 64 << 20


@pytest.fixture
def after_each_step(monkeypatch) -> Callable[[Callable[[int], None]], None]:
    """Has a function called after each step of a run, with the number of steps done."""

    def install(call: Callable[[int], None]) -> None:
        steps, one_step = 0, TrainStep.__call__

        def step_and_call(self, batches, **others):
            nonlocal steps
            loss = one_step(self, batches, **others)
            steps += 1
            call(steps)
            return loss

        monkeypatch.setattr(TrainStep, "__call__", step_and_call)

    return install


def test_a_wait_would_be_noticed():
    value = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize(
    "flags",
    [["--precision", "bf16"], ["--precision", "fp16", "--no-compile"], ["--precision", "fp32", "--micro-batch", "8"]],
)
def test_the_host_never_waits_in_the_loop(tmp_path, after_each_step, flags):
    """From the fifth step to the 40th, in all that torch does; DALI's own waits are not in it."""
    watched = []

    def watch(steps: int) -> None:
        if steps == 5:
            torch.cuda.set_sync_debug_mode("error")
        elif steps == 40:
            torch.cuda.set_sync_debug_mode("default")
        if torch.cuda.get_sync_debug_mode() == 2:
            watched.append(steps)

    after_each_step(watch)
    assert train.main([*FLAGS, *flags, "--steps", "42", "--out", str(tmp_path)]) == 0
    assert watched == list(range(5, 40))


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--precision", "fp16"]])
def test_memory_is_flat_over_200_steps(tmp_path, after_each_step, flags):
    """After the first epoch and its validation, which needs memory of its own. All of the device's memory: DALI's too."""
    reserved, used = [], []

    def read(steps: int) -> None:
        if steps > 50:
            free, total = torch.cuda.mem_get_info(DEVICE)
            reserved.append(torch.cuda.memory_reserved(DEVICE))
            used.append(total - free)

    after_each_step(read)
    assert train.main([*FLAGS, *flags, "--steps", "250", "--out", str(tmp_path)]) == 0
    assert len(reserved) == 200
    assert len(set(reserved)) == 1, "torch's own"
    assert max(used) - used[0] < MOST_GROWTH_BYTES, f"{used[0] >> 20} MiB → {max(used) >> 20} MiB"


def test_a_checkpoint_is_written_from_pinned_memory_while_the_weights_change(tmp_path, monkeypatch):
    may_write, save = threading.Event(), checkpoints.save

    def slow(*args, **named):
        assert may_write.wait(60)
        save(*args, **named)

    monkeypatch.setattr(checkpoints, "save", slow)
    writer, weight = CheckpointWriter(), torch.zeros(1 << 24, device=DEVICE)
    for steps in (1, 2):
        may_write.clear()
        for _ in range(100):
            weight += 1  # is still under way when the copy is asked for
        checkpoint = dataclasses.replace(make(steps), model={"weight": weight}, optimizer={"momentum": weight.double()})
        writer.begin(checkpoint, tmp_path, is_best=False, keep=2)
        weight -= 7
        torch.cuda.synchronize()
        may_write.set()
        writer.finish()
        loaded = load(tmp_path / "last.pt")
        assert loaded.model["weight"].unique().tolist() == [100 * steps - 7 * (steps - 1)]
        assert torch.equal(loaded.optimizer["momentum"], loaded.model["weight"].double())
    assert writer._memory
    assert all(memory.is_pinned() for memory in writer._memory)
