"""train.py --profile-memory, with a made-up record: torch's own needs a GPU."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

import train
from engine.config import parse_args
from engine.monitoring import memory_profile
from engine.monitoring.memory_profile import record_memory
from engine.monitoring.runlog import RunLog
from tests.engine.test_accuracy import RANKS
from tests.support.launch import SMALL


@pytest.fixture
def recording(monkeypatch) -> list[dict]:
    """How torch was told to record."""
    told: list[dict] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: told.append(settings))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [1, 2, 3]})
    return told


def open_log(out: Path, *flags: str) -> RunLog:
    out.mkdir(exist_ok=True)
    config = parse_args([*SMALL, "--out", str(out), *flags])
    return RunLog(config, steps_done=7, total_steps=20, top1=None, classes="ab", mean_rgb=(0, 0, 0), gpus=[])


def test_the_record_is_written_after_three_steps_and_then_ends(tmp_path, recording, capsys):
    of_rank = {
        rank: dataclasses.replace(RANKS, rank=rank, world_size=2, device=torch.device("cuda", 0)) for rank in (0, 1)
    }
    record_memory(of_rank[1])
    assert not recording, "nobody would write that"
    record_memory(of_rank[0])
    assert [settings.get("enabled", "all") for settings in recording] == ["all"]
    path = tmp_path / "memory.pickle"
    with open_log(tmp_path, "--profile-memory") as log:
        log.advance()
        log.advance()
        assert not path.exists()
        log.advance()
        assert pickle.loads(path.read_bytes()) == {"segments": [1, 2, 3]}
        assert recording[1:] == [{"enabled": None}]
        path.unlink()
        log.advance()
    assert not path.exists(), "once"
    assert capsys.readouterr().err.count(f"{path}: https://pytorch.org/memory_viz shows it") == 1


def test_a_run_that_ends_before_has_its_record(tmp_path, recording):
    with pytest.raises(torch.OutOfMemoryError), open_log(tmp_path, "--profile-memory"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert (tmp_path / "memory.pickle").exists()
    with open_log(tmp_path / "other") as log:
        log.advance()
    assert not (tmp_path / "other/memory.pickle").exists()


def test_a_full_disk_does_not_end_the_run(tmp_path, recording, monkeypatch, capsys):
    monkeypatch.setattr(memory_profile, "replacing", lambda _: 1 / 0)
    with open_log(tmp_path, "--profile-memory") as log:
        for _ in range(3):
            log.advance()
    assert "warning: memory.pickle cannot be written (division by zero)" in capsys.readouterr().err


def test_on_a_cpu_it_is_refused(tmp_path, capsys):
    assert train.main([*SMALL, "--profile-memory", "--out", str(tmp_path / "out")]) == 2
    assert "--profile-memory: torch records the memory of GPUs only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
