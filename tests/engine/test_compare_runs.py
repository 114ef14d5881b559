"""Runs against each other: table, picture, line of JSON, of finished and unfinished runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from engine.monitoring import compare_runs, curves
from engine.monitoring.confusion_matrix import draw_confusion
from engine.monitoring.run_files import drop_records_after
from perf.plot_style import new_figure, png


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


@pytest.mark.seconds
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
    assert curves.main(["--help"]) == 0
    assert "RUN" in capsys.readouterr().out
    assert curves.main([]) == 2
    assert curves.main([str(run), str(run)]) == 2
    assert "--help lists the flags" in capsys.readouterr().err
    assert curves.main([str(run)]) == 0
    assert json.loads(capsys.readouterr().out) == {"curves": str(run / "curves.png")}
    assert compare_runs.figures_of(compare_runs.read_run(run))["train_loss"] == 2.0


GOOD = {"kind": "train", "step": 3, "epoch": 0.5, "loss": 1.0, "lr": 0.01, "images_per_second": 9.0, "data_wait": 0.1}
TESTED = {"kind": "validation", "step": 3, "epoch": 1, "loss": 1.0, "top1": 0.5, "top5": 0.9}
DAMAGED = {
    "no JSON": b"step 3",
    "not UTF-8": b'{"kind": "train\xff"}',
    "zeros": bytes(300),
    "no table": b"[1, 2]",
    "deep": b"[" * 50_000,
    "very long": b'{"kind": "' + bytes(200_000) + b'"}',
    "many digits": b'{"kind": "train", "step": ' + b"1" * 5000 + b"}",
    "kind is a list": b'{"kind": []}',
    **{f"no {name}": json.dumps({**GOOD, name: None}).encode() for name in GOOD},
    **{f"text for {name}": json.dumps({**GOOD, name: "3"}).encode() for name in GOOD if name != "kind"},
    **{
        f"no {name} in a result": json.dumps({key: TESTED[key] for key in TESTED if key != name}).encode()
        for name in TESTED
    },
    "step is not a number": json.dumps({**GOOD, "step": math.nan}).encode(),
    "epoch is infinite": json.dumps({**GOOD, "epoch": math.inf}).encode(),
    "step is true": json.dumps({**GOOD, "step": True}).encode(),
    "lr does not fit": json.dumps({**GOOD, "lr": 10**400}).encode(),
    "loss cannot be drawn": json.dumps({**GOOD, "loss": 1.7e308}).encode(),
    "epoch cannot be drawn": json.dumps({**GOOD, "epoch": -1.7e308}).encode(),
}


@pytest.mark.parametrize("place", ["first", "middle"])
@pytest.mark.seconds
def test_damaged_lines_are_left_out_with_one_warning(tmp_path, capsys, place):
    run = write_run(tmp_path / "run", losses=[2.0, 1.0], top1=[0.5])
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [line + b"\n" for line in DAMAGED.values()]
    (run / "metrics.jsonl").write_bytes(b"".join([*bad, *lines] if place == "first" else [lines[0], *bad, *lines[1:]]))
    assert compare_runs.main([str(run), "--out", str(tmp_path / "picture.png")]) == 0
    assert curves.main([str(run)]) == 0
    said = capsys.readouterr()
    assert said.err == f"warning: {run}/metrics.jsonl: damaged lines are left out: {len(DAMAGED)}\n"
    assert compare_runs.figures_of(compare_runs.read_run(run))["train_loss"] == 1.0


def test_dropping_the_records_of_later_steps_loses_nothing_else(tmp_path):
    """Steps 1 and 2 stay, byte by byte, with what is damaged among them; a line that a crash has cut goes."""
    run = write_run(tmp_path / "run", losses=[2.0, 1.5, 1.0], top1=[0.5])
    path = run / "metrics.jsonl"
    first, second, third, result = path.read_bytes().splitlines(keepends=True)
    odd = [*(line + b"\n" for line in DAMAGED.values()), b'{"kind": "of a later version", "step": 9}\n', b"\n"]
    path.write_bytes(b"".join([first, *odd, third, second, result, third[:-20]]))
    drop_records_after(path, 2)
    kept = b"".join([first, *odd, second, result])
    assert path.read_bytes() == kept
    before = path.stat().st_ino
    drop_records_after(path, 2)
    assert path.stat().st_ino == before, "nothing to drop: the file is left alone"
    for tail in (b'{"kind"', bytes(100), bytes(70_000)):  # zeros are what a power cut leaves of a file that grew
        path.write_bytes(kept + tail)
        drop_records_after(path, 2)
        assert path.read_bytes().startswith(kept)
        assert path.read_bytes().endswith(b"\n"), "the next record gets a line of its own"
    path.write_bytes(first + second[:-1])
    drop_records_after(path, 2)
    assert path.read_bytes() == first + second
    drop_records_after(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_figures_that_are_not_finite_are_drawn_around(tmp_path, capsys):
    run = write_run(tmp_path / "run", losses=[2.0, math.nan, math.inf], top1=[math.nan])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0] |= {"lr": 0, "images_per_second": math.inf}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert compare_runs.main([str(run), "--out", str(tmp_path / "picture.png")]) == 0
    (figures,) = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)["runs"]
    assert (figures["train_loss"], figures["best_top1"], figures["images_per_second"]) == (None, None, 101.5)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1210, 770)


@pytest.mark.seconds
def test_drawing_says_nothing_of_what_its_font_lacks(tmp_path, own_warnings):
    """Nor of figures that a logarithmic axis has no place for."""
    run = write_run(tmp_path / "花", losses=[0.0], top1=[])
    assert curves.main([str(run)]) == 0
    draw_confusion(np.eye(2, dtype=np.int64), ["花", "木"])
    png(new_figure(1.0, "花"))
    assert [str(warning.message) for warning in own_warnings] == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("what", ["a folder", "a link to itself", "nothing", "aliases", "not UTF-8"])
def test_files_of_a_run_that_cannot_be_read(tmp_path, capsys, name, what):
    run = write_run(tmp_path / "run", losses=[1.0], top1=[])
    (run / name).unlink()
    if what == "a folder":
        (run / name).mkdir()
    elif what == "a link to itself":
        (run / name).symlink_to(name)
    elif what == "aliases":
        (run / name).write_text("a: &a [x]\nb: [*a, *a]\n")
    elif what == "not UTF-8":
        (run / name).write_bytes(b"\xff\n")
    assert curves.main([str(run)]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {run}: no f")
    assert not (run / "curves.png").exists()


@pytest.mark.seconds
def test_names_that_a_terminal_cannot_show(tmp_path, capsys):
    run = write_run(tmp_path / "a\udcff\x1b[31m", losses=[1.0], top1=[], data="d\x1b[2J\udcff")
    other = write_run(tmp_path / "b", losses=[1.0], top1=[])
    assert compare_runs.main([str(run), str(other), "--out", str(tmp_path / "picture.png")]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert r"a\udcff\x1b[31m" in output
    assert curves.main([str(run)]) == 0


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
