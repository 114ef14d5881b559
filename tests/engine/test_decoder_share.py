"""The share of the CPU's decoder, found on made-up decoders of known rates; and in a training, where it is kept."""

import dataclasses
import json
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import engine.data
import train
from engine.checkpoint import load
from engine.training import decoder_share
from engine.training.decoder_share import DecoderShare, ShareSearch
from tests.engine.test_accuracy import RANKS
from tests.engine.test_trainer import flags_of, small_network, unseen, write_images  # noqa: F401  # fixtures

BATCH, PREFETCH = 256, 2


@dataclasses.dataclass
class Machine:
    """A training with a loader that prepares PREFETCH batches in advance, on a clock of its own. Rates in images a second."""

    cpu: float
    gpu: float
    step: float
    share: float
    """The loader's."""
    seed: int = 0
    noise: float = 0.0
    """Of the time of each batch and of each step, as a share of it."""
    between_steps: bool = False
    """Whether the GPU's decoder works only while no step does."""

    def __post_init__(self) -> None:
        self.now = self.waited = self.cpu_free = self.gpu_free = 0.0
        self.queue: deque[tuple[float, float, float]] = deque()
        """Of each batch when it is ready, the time that the GPU's decoder needs between steps, and its share."""
        self.random = np.random.default_rng(self.seed)

    def rate(self, share: Any) -> Any:
        """Without noise."""
        by_cpu, by_gpu, step = share / self.cpu, (1 - share) / self.gpu, 1 / self.step
        return 1 / np.maximum(by_cpu, step + by_gpu if self.between_steps else np.maximum(step, by_gpu))

    def train(self) -> None:
        """One step: has one more batch begun, and takes the first."""
        while len(self.queue) <= PREFETCH:
            by_cpu, by_gpu = self._noisy(self.share / self.cpu), self._noisy((1 - self.share) / self.gpu)
            self.cpu_free = max(self.cpu_free, self.now) + by_cpu
            self.gpu_free = max(self.gpu_free, self.now) + by_gpu
            ready = self.cpu_free if self.between_steps else max(self.cpu_free, self.gpu_free)
            self.queue.append((ready, by_gpu if self.between_steps else 0.0, self.share))
        ready, by_gpu, _ = self.queue.popleft()
        began, self.now = self.now, max(self.now, ready) + by_gpu
        self.waited += self.now - began
        self.now += self._noisy(1 / self.step)

    def wait_seconds(self) -> float:
        return self.waited

    def _noisy(self, seconds: float) -> float:
        return BATCH * seconds * max(0.5, 1 + self.noise * self.random.standard_normal())


def share_of(machine: Any, monkeypatch, **settings) -> DecoderShare:
    monkeypatch.setattr(decoder_share, "perf_counter", lambda: machine.now)
    data: Any = SimpleNamespace(
        ranks=RANKS,
        config=SimpleNamespace(batch_size=BATCH),
        micro_batch=BATCH,
        loading=SimpleNamespace(prefetch=PREFETCH),
    )
    return DecoderShare(machine, machine, data, **settings)


@pytest.mark.parametrize("between_steps", [False, True], ids=["", "the GPU decodes between steps"])
@pytest.mark.parametrize("step", [1500.0, 4600.0, 1e9])
@pytest.mark.parametrize("gpu", [800.0, 2000.0, 5000.0, 15_000.0])
@pytest.mark.parametrize("cpu", [1.0, 200.0, 800.0, 2000.0, 5000.0, 12_000.0])
def test_within_100_steps_training_is_within_5_percent_of_its_best_and_the_share_stays(
    cpu, gpu, step, between_steps, monkeypatch
):
    best = Machine(cpu, gpu, step, 0.0, between_steps=between_steps).rate(np.linspace(0, 1, 1001)).max()
    for start in (1 / 12, 6 / 12, 1.0):
        for seed in range(3):
            machine = Machine(cpu, gpu, step, start, seed=seed, noise=0.03, between_steps=between_steps)
            share = share_of(machine, monkeypatch)
            shares = []
            for _ in range(200):
                machine.train()
                share.after_step()
                shares.append(machine.share)
            assert set(shares[100:]) == {share.found}
            assert machine.rate(share.found) >= 0.95 * best, (start, seed, share.found)


def test_without_noise_the_rate_is_the_one_of_the_share_alone(monkeypatch):
    """Batches that were made with another share are not counted."""
    machine = Machine(cpu=1000, gpu=3000, step=1e9, share=0.5)
    share, told = share_of(machine, monkeypatch), []
    measured = ShareSearch.measured

    def look(search: ShareSearch, images: int, seconds: float, *, waits: bool) -> None:
        told.append((search.share, images / seconds))
        measured(search, images, seconds, waits=waits)

    monkeypatch.setattr(ShareSearch, "measured", look)
    while share.found is None:
        machine.train()
        share.after_step()
    for tried, rate in told:
        assert rate == pytest.approx(machine.rate(tried), rel=1e-6), tried
    assert share.found == pytest.approx(0.25, abs=0.01)


def test_a_pause_is_not_measured(monkeypatch):
    """As for a validation or a checkpoint: queues fill up meanwhile."""
    machine = Machine(cpu=1000, gpu=3000, step=1e9, share=0.5)
    share = share_of(machine, monkeypatch)
    for step in range(300):
        machine.train()
        share.after_step()
        if step % 29 == 28:
            machine.now += 100
            share.after_pause()
    assert share.found == pytest.approx(0.25, abs=0.01)


def test_a_pause_lets_no_share_pass_for_fast_enough(monkeypatch):
    """A loader that is a fifteenth too slow, with batches ready: steps do not wait at first."""
    machine = Machine(cpu=1000, gpu=3000, step=3200, share=0.0)
    share = share_of(machine, monkeypatch)
    for _ in range(100):
        machine.train()
        share.after_step()
        if machine.now < 60:
            machine.now += 10
            share.after_pause()
    assert machine.rate(share.found) == pytest.approx(3200)


def test_what_all_ranks_have_measured_decides(monkeypatch):
    """The seconds of the first, and the wait of the one that waits longest."""
    machine = Machine(cpu=1000, gpu=3000, step=1e9, share=0.5)
    share, told = share_of(machine, monkeypatch), []
    others = [(12.5, 0.1), (12.6, 0.3), (12.7, 0.0)]
    monkeypatch.setattr(decoder_share, "gather", lambda own, ranks: others)
    monkeypatch.setattr(
        ShareSearch, "measured", lambda search, images, seconds, *, waits: told.append((seconds, waits))
    )
    for _ in range(40):
        machine.train()
        share.after_step()
    assert set(told) == {(12.5, True)}


def test_ranks_begin_with_the_share_of_rank_0(monkeypatch):
    """Another machine has other cores: with a start of its own, it would try other shares, and find one after another time."""
    machine = Machine(cpu=1000, gpu=3000, step=1e9, share=0.9)
    monkeypatch.setattr(decoder_share, "on_rank_0", lambda ranks, call: 0.25)
    assert share_of(machine, monkeypatch).share == machine.share == 0.25


def test_a_share_counts_as_found_when_no_batch_comes_any_more_that_was_made_with_another(monkeypatch):
    """It is in the checkpoint from then on, and a run that goes on with it gets the batches of one that was never stopped."""
    machine = Machine(cpu=1000, gpu=3000, step=1e9, share=0.5)
    share = share_of(machine, monkeypatch)

    def choose(search: ShareSearch, images: int, seconds: float, *, waits: bool) -> None:
        search.share, search.found = 0.9, True

    monkeypatch.setattr(ShareSearch, "measured", choose)
    while share.found is None:
        machine.train()
        share.after_step()
    assert {of_batch for _, _, of_batch in machine.queue} == {share.found} == {0.9}


def test_what_was_found_is_not_sought_again(monkeypatch):
    machine = Machine(cpu=1000, gpu=3000, step=1e9, share=0.7, noise=0.03)
    share = share_of(machine, monkeypatch, is_found=True)
    for _ in range(100):
        machine.train()
        share.after_step()
        assert (machine.share, share.share, share.found) == (0.7, 0.7, 0.7)


@pytest.mark.parametrize("start", [0.0, 0.013, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_search_ends_whatever_it_is_told(start, seed):
    search, tried, random = ShareSearch(start), [], np.random.default_rng(seed)
    while not search.found:
        tried.append(search.share)
        search.measured(1, 10 ** random.uniform(-6, 1), waits=True)
    assert all(0 <= share <= 1 for share in [*tried, search.share])
    assert len(tried) == len(set(tried)) <= 6


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_with_which_the_training_does_not_wait_is_taken(share):
    search = ShareSearch(share)
    search.measured(1, 1.0, waits=False)
    assert (search.share, search.found) == (share, True)


# ---- in a training -----------------------------------------------------------------------------------------------


@pytest.fixture
def split_on_a_cpu(monkeypatch):
    """Both decoders are the CPU's."""
    open_data = engine.data.open_data

    def opened(source, ranks, precision, loading, **others):
        data = open_data(source, ranks, precision, dataclasses.replace(loading, decoder="auto"), **others)
        return dataclasses.replace(data, loading=loading)

    monkeypatch.setattr(engine.data, "open_data", opened)
    monkeypatch.setattr(decoder_share, "_WARM_UP_STEPS", 1)
    monkeypatch.setattr(decoder_share, "_MEASURED_STEPS", 1)
    monkeypatch.setattr(decoder_share, "_LEAST_WAIT", -1.0)  # or the first share might do


def shares_in(out) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["decoder_share"] for line in lines if line["kind"] == "train"]


@pytest.mark.seconds
@pytest.mark.usefixtures("split_on_a_cpu", "unseen", "small_network")
def test_a_run_says_its_share_and_a_resumed_one_keeps_to_what_was_found(tmp_path_factory, tmp_path, capsys):
    folder = write_images(tmp_path_factory.mktemp("images"), ["one", "two"], 60)  # an epoch is 30 steps
    flags = flags_of(folder, tmp_path, "--decoder", "split", "--epochs", "40")
    assert train.main([*flags, "--steps", "4"]) == 0
    assert load(tmp_path / "last.pt").decoder_share is None, "not found yet"
    assert train.main([*flags, "--steps", "60"]) == 0
    found = load(tmp_path / "last.pt").decoder_share
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["decoder_share"] == found
    assert f"CPU decodes {found:.0%}" in captured.err
    shares = shares_in(tmp_path)
    assert len(set(shares)) > 2
    assert set(shares[-5:]) == {found}
    assert train.main([*flags, "--steps", "70"]) == 0
    assert set(shares_in(tmp_path)[60:]) == {found}
    assert load(tmp_path / "last.pt").decoder_share == found
    capsys.readouterr()
    assert train.main([*flags, "--decoder", "cpu", "--steps", "71"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decoder_share"] is None
    assert load(tmp_path / "last.pt").decoder_share is None
