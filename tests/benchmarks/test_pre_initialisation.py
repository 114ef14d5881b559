"""benchmarks/pre_initialisation.py: the weights that it makes itself, its verdicts, its picture. Training is train.py's."""

import numpy as np
from scipy import stats

from benchmarks.pre_initialisation import plot, starts, summarise, write_small_normal
from engine.config import parse_args
from engine.networks import load_network


def test_small_normal_is_what_train_py_reads(tmp_path):
    """As --weights reads it: normal with standard deviation 0.01 in every layer, biases 0."""
    path = tmp_path / "normal.pth"
    config = parse_args(["--data", "digits", "--arch", "E"])
    write_small_normal(config, 10, path)
    spec = starts(tmp_path / "a.pt", path)["random, normal of standard deviation 0.01"][1]
    network = load_network(spec)
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


def test_the_picture_has_a_curve_for_each_run(tmp_path):
    names = list(starts(tmp_path, tmp_path))
    runs = {name: {"history": entries(0.1, 0.2), "diverged_at": None} for name in names[1:]}
    picture = plot({names[0]: {"history": [], "diverged_at": 2}, **runs}, 0.1, "title")
    assert picture.startswith(b"\x89PNG")
