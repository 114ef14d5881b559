"""benchmarks/pre_initialisation.py: the weights that it makes itself, its verdicts, its picture. Training is train.py's."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from benchmarks import pre_initialisation
from benchmarks.pre_initialisation import starts, summarise, write_small_normal
from engine.config import parse_args, save_config
from engine.monitoring.run_files import CONFIG, METRICS
from engine.networks import load_network

RECORD = {
    "kind": "train",
    "step": 1,
    "epoch": 0.1,
    "loss": 2.3,
    "lr": 0.01,
    "images_per_second": 100.0,
    "data_wait": 0.0,
}


def test_small_normal_is_what_train_py_reads(tmp_path):
    """As --weights reads it: normal with standard deviation 0.01 in every layer, biases 0."""
    path = tmp_path / "normal.pth"
    config = parse_args(["--data", "digits", "--arch", "E"])
    write_small_normal(config, 10, path)
    spec = starts(tmp_path / "a.pt", path)["random, normal of standard deviation 0.01"][1]
    network = load_network(spec).for_std(config.std_rgb)
    assert (network.arch, network.crop, network.outputs) == ("E", 32, 10)
    generator = np.random.default_rng(0)
    for name, weight in network.state.items():
        if name.endswith("bias"):
            assert not weight.any()
            continue
        values = generator.choice(weight.numpy().ravel(), min(weight.numel(), 5000), replace=False)
        assert stats.kstest(values, "norm", (0, 0.01)).pvalue > 1e-4, name


def test_the_starts_are_flags_of_train_py(tmp_path):
    for name, flags in starts(tmp_path / "a.pt", tmp_path / "normal.pth").items():
        config = parse_args(["--data", "digits", *flags])
        assert bool(config.init_from) == name.startswith("A's layers")


@pytest.mark.parametrize(
    "flags", [["--arch", "A"], ["--batch-norm"], ["--weights", "a.pt"], ["--init", "kaiming"]], ids=" ".join
)
def test_what_the_experiment_chooses_is_not_a_flag_of_its_own(tmp_path, capsys, flags):
    given = ["--data", "digits", "--init-from", str(tmp_path / "a.pt"), "--out", str(tmp_path / "out"), *flags]
    assert pre_initialisation.main(given) == 2
    assert f"{flags[0]}: the benchmark chooses it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def entries(*top1: float) -> list[dict]:
    return [{"epoch": number, "loss": 1.0, "top1": value} for number, value in enumerate(top1, start=1)]


def test_what_counts_as_learned():
    assert summarise({"history": entries(0.1, 0.25), "diverged_at": None}, chance=0.1)["learned"]
    assert not summarise({"history": entries(0.25, 0.15), "diverged_at": None}, chance=0.1)["learned"]
    assert not summarise({"history": entries(0.25), "diverged_at": 150}, chance=0.1)["learned"]
    assert summarise({"history": [], "diverged_at": 2}, chance=0.1) == {
        "top1_by_epoch": [],
        "top1": None,
        "diverged_at": 2,
        "learned": False,
    }


def test_the_runs_are_summed_up_and_drawn(tmp_path, monkeypatch, capsys):
    """Six runs, of which one diverges; train.py is not started."""

    def run(out, flags):
        (out / METRICS).write_text(json.dumps(RECORD) + "\n")
        save_config(parse_args([*flags, "--out", str(out)]), out / CONFIG)
        diverged = "normal" in flags and "--init-from" not in flags
        return {"history": [] if diverged else entries(0.5, 0.9), "diverged_at": 2 if diverged else None}

    monkeypatch.setattr(pre_initialisation, "run_trainer", run)
    monkeypatch.setattr(pre_initialisation, "write_small_normal", lambda *_: None)
    monkeypatch.setattr(pre_initialisation.checkpoint, "load", lambda path: SimpleNamespace(classes="0123456789"))
    flags = ["--data", "digits", "--init-from", str(tmp_path / "a.pt"), "--out", str(tmp_path / "out")]
    assert pre_initialisation.main(flags) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [" did not learn" in line for line in lines] == [False, True, False, False, False, False]
    assert "diverged in step 2" in lines[1]
    result = json.loads(last)
    assert [entry["top1"] for entry in result["runs"].values()] == [0.9, None, 0.9, 0.9, 0.9, 0.9]
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
