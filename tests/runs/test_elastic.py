"""Machines that join and leave; here, two torchruns on this one."""

import signal
import threading

import pytest
import torch.distributed as dist

from common import ranks
from common.errors import TrainingError
from tests.support.launch import SMALL, free_port, kill_all, results_of_output, start, wait_for
from tests.support.used import read_used


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM])
def test_a_machine_joins_and_leaves(tmp_path, monkeypatch, fault):
    """kill -9 of a torchrun and its rank, or SIGTERM of it: the run goes on at the new world size."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    torchrun = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_conf=last_call_timeout=2"]
    flags = [*SMALL, "--steps", "150", "--checkpoint-minutes", "0.05", "--out", str(tmp_path)]
    first = start(*flags, torchrun=torchrun, script="tests/support/programs/recording_worker.py")
    second = None
    try:
        wait_for(first, "step 3/")
        second = start(*flags, torchrun=torchrun, script="tests/support/programs/recording_worker.py")
        wait_for(first, "note: ranks were 1 until now and are 2")
        for _ in range(5):
            wait_for(first, "step ")
        if fault == signal.SIGKILL:
            kill_all(second)
        else:
            second.terminate()
        wait_for(first, "going on from")
        output, error = first.communicate(timeout=150)
        assert first.returncode == 0, error
        second.communicate(timeout=60)
    finally:
        for torchruns in filter(None, (first, second)):
            kill_all(torchruns)
    assert results_of_output(output)["steps"] == 150
    used = read_used(tmp_path, batch_size=12)
    assert used.world_sizes == [1, 2, 1]
    assert not used.differing
    assert fault == signal.SIGKILL or not used.repeated_steps
    assert set(used.rows(0, 1437).values()) == {1}


def test_ranks_find_each_other_whatever_an_earlier_start_left_in_the_store(monkeypatch):
    shared = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(shared, 0, 0)]))
    shared.set("asks/1", "a rank that is gone")
    for start_number in range(3):
        stores: dict[int, dist.Store] = {}

        def begin(rank: int, stores=stores) -> None:
            stores[rank] = ranks._store_of_this_start(rank, 3)

        threads = [threading.Thread(target=begin, args=(rank,)) for rank in (0, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stores[0].set("key", f"value {start_number}")
        assert stores[1].get("key") == stores[2].get("key") == f"value {start_number}".encode()


def test_a_rank_that_never_comes(monkeypatch):
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 0, 0)]))
    monkeypatch.setattr(ranks, "_PATIENCE_TO_START", ranks.timedelta(0))
    with pytest.raises(TrainingError, match="rank 1 did not come within 0 minutes"):
        ranks._store_of_this_start(0, 2)


def test_ranks_whose_torchrun_is_gone_end_by_themselves(monkeypatch):
    """Killed before they could ask the kernel to tell them."""
    of_torchrun = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    port = str(free_port())
    for name, value in {**of_torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_PATIENCE_FOR_TORCHRUN", ranks.timedelta(seconds=1))
    with pytest.raises(TrainingError, match=f"nobody answers at 127.0.0.1:{port}.*torchrun is gone"):
        ranks._store_of_this_start(0, 1)
