"""evaluate.py and features.py as a user starts them: figures on several ranks, fusion, posteriors used again, tables."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import features
from engine.checkpoint import Checkpoint, load, save
from engine.evaluation.posteriors import LOST, POSTERIOR_SCALE
from engine.evaluation.row_files import open_rows
from engine.networks import Network
from model.vgg import build
from model.weights import NOT_DIVIDED, for_std, to_torchvision
from pipeline.dataset.manifest import open_manifest
from tests.support.images import photographs
from tests.support.launch import results_of, run

CLASSES = ("class0", "class1", "class2", "class3", "class4", "class5", "class6")
CROP, IMAGES = 32, 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """41 validation images of various sizes, 48 pixels their shorter side; one of them is damaged after the scan."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", IMAGES)):
        for number in range(count):
            place = root / split / CLASSES[number % len(CLASSES)]
            place.mkdir(parents=True, exist_ok=True)
            left, top, longer = generator.integers(0, (300, 150, 24))
            image = photographs()[number % 2].crop((left, top, left + 250, top + 250))
            image.resize((48, 48 + longer // 4) if number % 3 else (48 + longer // 4, 48)).save(place / f"{number}.jpg")
    manifest = open_manifest(root)
    os.truncate(manifest.val.path(17), 300)
    return root


def checkpoint(path: Path, *, arch: str = "A", seed: int, train_scale: str) -> str:
    """A checkpoint of a network with random weights, which tells images apart."""
    model = build(
        arch, classes=len(CLASSES), crop=CROP, dropout=0.5, init="kaiming", device=torch.device("cpu"), seed=seed
    )
    path.mkdir()
    content = Checkpoint(
        arch=arch,
        crop=CROP,
        classes=list(CLASSES),
        mean_rgb=[120.0, 110.0, 100.0],
        model=model.state_dict(),
        optimizer={},
        scaler={},
        steps=1,
        samples_seen=1,
        history=[],
        fingerprint="",
        config={"train_scale": train_scale},
        world_size=1,
    )
    return str(save(content, path, is_best=False, keep=1))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("networks")
    return [checkpoint(root / str(seed), seed=seed, train_scale=scale) for seed, scale in ((1, "36"), (2, "36-73"))]


@pytest.mark.slow
def test_figures_are_the_same_on_any_number_of_ranks_with_a_bad_image_among_them(tmp_path, folder, two):
    files = []
    figures = []
    for ranks in (0, 2, 3):
        out = tmp_path / str(ranks)
        flags = ["--checkpoint", two[0], "--data", str(folder), "--scales", "40,48", "--posteriors", str(out)]
        done = run(*flags, ranks=ranks, script="evaluate.py")
        results = results_of(done)
        assert results["world_size"] == max(ranks, 1)
        assert f"warning: {open_manifest(folder).val.path(17)} cannot be decoded" in done.stderr
        figures.append({key: results[key] for key in ("top1", "top5", "images", "lost")})
        files.append({path.name: np.load(path) for path in out.glob("*.npy")})
    assert (figures[0]["images"], figures[0]["lost"]) == (IMAGES, 1)
    assert 0 < figures[0]["top5"] < 1
    assert figures[0] == figures[1] == figures[2]
    assert len(files[0]) == 2
    for name, posteriors in files[0].items():
        assert posteriors.dtype == np.float16
        assert np.array_equal(np.flatnonzero((posteriors == LOST).any(axis=1)), [17])
        for others in files[1:]:
            assert np.array_equal(posteriors, others[name]), "to the last bit"


def results(capsys, *flags: str) -> dict:
    assert evaluate.main(list(flags)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_networks_and_scales_are_averaged_and_nothing_is_computed_twice(tmp_path, folder, two, capsys, monkeypatch):
    common = ["--data", str(folder), "--posteriors", str(tmp_path), "--protocol", "dense", "--scales", "36,40"]
    alone = [results(capsys, "--checkpoint", path, *common) for path in two]
    assert all(result["images_per_second"] for result in alone)
    monkeypatch.setattr(Network, "build", lambda *_: pytest.fail("the network was run"))
    fused = results(capsys, "--checkpoint", *two, *common)
    again = results(capsys, "--checkpoint", two[0], *common)
    assert fused["images_per_second"] is None
    assert {**again, "images_per_second": 0} == {**alone[0], "images_per_second": 0}

    posteriors = [np.load(path).astype(float) / POSTERIOR_SCALE for path in tmp_path.glob("*.npy")]
    assert len(posteriors) == 4  # of two networks at two scales
    assert np.allclose(np.sum(posteriors, axis=2)[:, np.arange(IMAGES) != 17], 1, atol=2e-3)
    val = open_manifest(folder).val
    labels = val.read(np.arange(IMAGES)).labels
    order = np.argsort(-np.mean(posteriors, axis=0), axis=1, kind="stable")
    right = order == labels[:, None]
    right[17] = False
    assert fused["top1"] == right[:, 0].sum() / IMAGES
    assert fused["top5"] == right[:, :5].sum() / IMAGES


@pytest.mark.slow
def test_center_is_the_validation_of_training(tmp_path, folder, capsys):
    out = tmp_path / "run"
    small = [
        "--arch",
        "A",
        "--crop",
        "32",
        "--train-scale",
        "40",
        "--batch-size",
        "7",
        "--epochs",
        "1",
        "--lr",
        "0.001",
    ]
    run(*small, "--data", str(folder), "--out", str(out))
    history = load(out / "last.pt").history[-1]
    # The batch is the training's.
    flags = [
        "--checkpoint",
        str(out / "last.pt"),
        "--data",
        str(folder),
        "--posteriors",
        str(tmp_path),
        "--batch-size",
        "7",
    ]
    result = results(capsys, *flags, "--protocol", "center")
    assert result["lost"] == 1
    assert {key: result[key] for key in ("top1", "top5", "images", "lost")} == {
        key: history[key] for key in ("top1", "top5", "images", "lost")
    }


def test_a_table_has_its_rows_filled_from_what_is_given(tmp_path, folder, two, capsys):
    assert (
        evaluate.main(["--table", "3", "--checkpoint", *two, "--data", str(folder), "--posteriors", str(tmp_path)]) == 0
    )
    output = capsys.readouterr()
    lines = output.out.splitlines()
    result = json.loads(lines[-1])
    (row,) = result["rows"]
    assert (row["checkpoints"], row["protocol"], row["scales"]) == ([two[0]], "dense", [[36]])
    cells = next(line.split() for line in lines if line.startswith("A  "))
    assert cells == ["A", "36", "36", f"{row['top1_error']:.1f}", "29.6", f"{row['top5_error']:.1f}", "10.4"]
    assert f"{two[1]}: belongs to no row of Table 3" in output.err


@pytest.mark.slow
def test_features_are_dense_averaged_and_of_length_1(tmp_path, folder, two, capsys):
    flags = ["--checkpoint", two[0], "--data", str(folder), "--scales", "40,48", "--output", str(tmp_path), "--svm"]
    assert features.main(flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= result["accuracy"] <= 1
    train, val = (np.load(tmp_path / f"{split}.npy") for split in ("train", "val"))
    assert (train.shape, val.shape, val.dtype) == ((14, 4096), (IMAGES, 4096), np.float32)
    there = np.arange(IMAGES) != 17
    assert np.allclose(np.linalg.norm(val[there], axis=1), 1, atol=1e-5)
    assert np.isnan(val[17]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes.txt", "train-labels.npy", "train.npy", "val-labels.npy", "val.npy",
    ]  # fmt: skip


def changed(source: str, path: Path, **entries) -> str:
    """The same checkpoint with other entries."""
    torch.save({**torch.load(source), **entries}, path)
    return str(path)


def test_outputs_in_another_order_and_without_names_give_the_same_figures(tmp_path, folder, two, capsys):
    """By name where a checkpoint has names; a file without any has its outputs in the folders' order here. Fused, too."""
    common = ["--data", str(folder), "--posteriors", str(tmp_path / "p"), "--protocol", "center", "--scales", "40"]
    keys = ("top1", "top5", "images", "lost")
    expected = results(capsys, "--checkpoint", two[0], *common)
    order = [3, 0, 6, 2, 1, 5, 4]
    model = load(Path(two[0])).model
    turned = {name: value[order] if name.startswith("classifier.6") else value for name, value in model.items()}
    other = changed(two[0], tmp_path / "turned.pt", classes=[CLASSES[n] for n in order], model=turned)
    bare, _ = to_torchvision(model, (120.0, 110.0, 100.0), NOT_DIVIDED)
    torch.save(bare, tmp_path / "bare.pth")
    assert 0 < expected["top5"] < 1
    assert {key: results(capsys, "--checkpoint", other, *common)[key] for key in keys} == {
        key: expected[key] for key in keys
    }
    fused = results(capsys, "--checkpoint", two[0], other, *common)
    assert {key: fused[key] for key in keys} == {key: expected[key] for key in keys}
    assert evaluate.main(["--checkpoint", f"torchvision:{tmp_path / 'bare.pth'}", *common]) == 0
    assert "it has no class names; its outputs are taken for the classes sorted by name" in capsys.readouterr().err
    foreign = changed(two[0], tmp_path / "foreign.pt", classes=[str(n) for n in range(7)])
    assert evaluate.main(["--checkpoint", foreign, *common]) == 2
    assert "it knows the classes 0, 1, 2 and 4 more, the data set has class0, class1" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["center", pytest.param("multicrop+dense", marks=pytest.mark.slow)])
def test_a_network_whose_images_are_divided_gives_the_same_posteriors(tmp_path, folder, two, capsys, protocol):
    std = (40.0, 100.0, 57.0)
    model = for_std(load(Path(two[0])).model, NOT_DIVIDED, std)
    divided = changed(two[0], tmp_path / "divided.pt", std_rgb=list(std), model=model)
    flags = ["--data", str(folder), "--posteriors", str(tmp_path / "p"), "--protocol", protocol, "--scales", "40"]
    expected, found = (results(capsys, "--checkpoint", path, *flags) for path in (two[0], divided))
    assert found["images_per_second"], "not those of the other network"
    assert {**found, "checkpoints": 0, "images_per_second": 0} == {**expected, "checkpoints": 0, "images_per_second": 0}
    one, other = (np.load(path).astype(np.float32) for path in list((tmp_path / "p").glob("*.npy"))[:2])
    assert np.abs(one - other).max() < 2e-3 * one.max()


def test_posteriors_of_an_earlier_version_are_computed_anew(tmp_path, folder, two, capsys):
    """There, NaN was both an image that is lost and an answer that is not finite."""
    flags = ["--checkpoint", two[0], "--data", str(folder), "--posteriors", str(tmp_path), "--protocol", "center"]
    first = results(capsys, *flags)
    (path,) = tmp_path.glob("*.npy")
    posteriors = np.load(path)
    np.save(path, np.where(np.arange(IMAGES)[:, None] < 30, np.float16(np.nan), posteriors))
    again = results(capsys, *flags)
    assert again["images_per_second"]
    assert {**again, "images_per_second": 0} == {**first, "images_per_second": 0}
    assert np.array_equal(np.load(path), posteriors)


def test_a_file_that_holds_no_rows_is_none(tmp_path):
    path = tmp_path / "rows.npy"
    contents = io.BytesIO(), io.BytesIO(), io.BytesIO(b"PK"), io.BytesIO()
    np.savez(contents[0], rows=np.zeros((2, 3), np.float16))  # an archive, which np.load opens
    np.save(contents[1], np.array([[{}]]), allow_pickle=True)
    for content in contents:
        path.write_bytes(content.getvalue())
        assert open_rows(path, (2, 3), np.float16) is None
    np.save(path, np.zeros((2, 3), np.float16))
    assert open_rows(path, (2, 3), np.float16) is not None


@pytest.mark.slow
def test_an_overflow_in_float16_says_so(tmp_path, folder, two, capsys):
    model = load(Path(two[0])).model
    model["classifier.6.bias"] = model["classifier.6.bias"] - 1e5  # in float16 -inf: as a posterior, 0
    checkpoint = changed(two[0], tmp_path / "large.pt", model=model)
    flags = ["--checkpoint", checkpoint, "--data", str(folder), "--posteriors", str(tmp_path / "p")]
    assert evaluate.main([*flags, "--precision", "fp16", "--protocol", "center"]) == 1
    assert "is not finite in float16; compute in float32, with --precision fp32" in capsys.readouterr().err
    assert evaluate.main([*flags, "--protocol", "center"]) == 0


@pytest.mark.parametrize("program", ["evaluate", "features"])
def test_an_answer_that_is_not_finite_is_not_a_lost_image(tmp_path, folder, two, capsys, program):
    model = {
        name: torch.full_like(value, 1e30) if name.endswith("0.weight") else value
        for name, value in load(Path(two[0])).model.items()
    }
    flags = ["--checkpoint", changed(two[0], tmp_path / "large.pt", model=model), "--data", str(folder)]
    if program == "evaluate":
        assert evaluate.main([*flags, "--posteriors", str(tmp_path / "p")]) == 1
    else:
        assert features.main([*flags, "--output", str(tmp_path / "p")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"its answer for {folder}/" in said.err
    assert "is not finite; its weights, though finite, cannot be used" in said.err
    assert not list((tmp_path / "p").glob("*.npy"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--scales", "20"], "takes images of 32 pixels at least"),
        (["--table", "5"], "it needs D at [36;73], E at [36;73]"),
        (["--data", "digits"], "knows 7 classes, the data set has 10"),
        (["--table", "4", "--scales", "40"], "--table 4 decides it"),
        (["--scales", "forty"], "give numbers of pixels"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, folder, two, capsys, flags, sentence):
    out = tmp_path / "posteriors"
    assert evaluate.main(["--checkpoint", two[0], "--data", str(folder), "--posteriors", str(out), *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
