"""Runs against each other: table, picture, line of JSON, of finished and unfinished runs."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from engine import compare_runs, curves


def write_run(folder: Path, *, losses: list[float], top1: list[float], cut: bool = False, **config) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for index, loss in enumerate(losses):
        speed = 100.0 + index
        record = {"kind": "train", "step": index + 1, "epoch": (index + 1) / 2, "loss": loss, "lr": 0.01}
        lines.append({**record, "images_per_second": speed, "data_wait": 0.1})
    for index, share in enumerate(top1):
        record = {"kind": "validation", "step": 2 * index + 2, "epoch": index + 1, "loss": 1.0, "top1": share}
        lines.append({**record, "top5": 0.9, "images": 10, "lost": 0})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text[:-20] if cut else text)
    (folder / "config.yaml").write_text(yaml.safe_dump({"arch": "A", "lr": 0.01, "out": str(folder), **config}))
    return folder


def test_two_runs(tmp_path, capsys):
    one = write_run(tmp_path / "runs/one", losses=[2.0, 1.5, 1.2], top1=[0.5, 0.4])
    two = write_run(tmp_path / "runs/two$^$", losses=[2.2], top1=[], lr=0.1, dropout=0.2)
    picture = tmp_path / "both.png"
    assert compare_runs.main([str(one), str(two), "--out", str(picture)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split()[:6] == ["run", "lr", "dropout", "epoch", "train", "loss"]
    assert table[1].split() == ["one", "0.01", "–", "2.00", "1.200", "1.000", "40.00", "90.00", "50.00", "101", "10"]
    assert table[2].split() == ["two$^$", "0.1", "0.2", "0.50", "2.200", "–", "–", "–", "–", "100", "10"]
    results = json.loads(last)
    assert results["picture"] == str(picture)
    assert [run["best_top1"] for run in results["runs"]] == [0.5, None]
    assert results["runs"][1]["flags"] == {"lr": 0.1, "dropout": 0.2}
    assert Image.open(picture).size == (1210, 770)


def test_a_line_that_is_just_being_written_does_not_count(tmp_path, capsys):
    run = write_run(tmp_path / "run", losses=[2.0, 1.0], top1=[], cut=True)
    assert curves.main([str(run)]) == 0
    assert json.loads(capsys.readouterr().out) == {"curves": str(run / "curves.png")}
    assert compare_runs.figures_of(compare_runs.read_run(run))["train_loss"] == 2.0


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/x", "/r/b/x"], ["a/x", "b/x"]),
        (["/r/a"], ["a"]),
        (["/r/a", "/r/a/earlier-1"], ["a", "a/earlier-1"]),
    ],
)
def test_short_names(folders, names):
    assert compare_runs.short_names([Path(folder) for folder in folders]) == names


def test_what_is_no_run_is_said(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert compare_runs.main([str(tmp_path / "empty")]) == 2
    assert "no folder of a run" in capsys.readouterr().err
    nothing_yet = write_run(tmp_path / "nothing", losses=[], top1=[])
    assert compare_runs.main([str(nothing_yet)]) == 2
    assert "no figures of a run yet" in capsys.readouterr().err
    run = write_run(tmp_path / "run", losses=[1.0], top1=[])
    assert compare_runs.main([str(run), "--out", str(tmp_path / "none/picture.png")]) == 2
    assert "none/picture.png: cannot be written" in capsys.readouterr().err
    assert compare_runs.main([]) == 2
