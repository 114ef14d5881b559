"""profile/report.py: what it writes, what it prints, what it divides, and what it says of files that are no reports."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from perf.compare_reports import compare, comparison, comparison_tables, differences
from perf.report_format import check_report
from perf.show import main, print_report, write_report
from tests.made_up_report import cpu_report, gpu_report, summary

ROOT = Path(__file__).parent.parent


@pytest.fixture
def written(tmp_path) -> Path:
    (tmp_path / "report.json").write_text(json.dumps(gpu_report()))
    return tmp_path / "report.json"


def test_report_writes_a_page_and_pictures(written, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([str(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["bound"] == "input"
    assert list(result["pictures"]) == ["waterfall", "timeline", "telemetry", "roofline"]
    html = Path(result["page"]).read_text()
    for path in result["pictures"].values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            colours = image.convert("RGB").getcolors(1 << 24)
            assert min(image.size) > 500
            assert colours is not None
            assert len(colours) > 50
    assert html.count("data:image/png;base64,") == 4
    table = "\n".join(lines)
    assert gpu_report()["verdict"]["sentence"] in table
    assert any(
        line.split() == ["step", "alone", "6,020", "5,960–6,110", "3,010", "85.0", "120", "0.4", "%"] for line in lines
    )
    assert any(line.split() == ["backward", "53.7", "53.2–54.5", "24.3"] for line in lines)


def test_report_of_a_cpu_run_leaves_no_picture_of_an_earlier_one(written, capsys):
    write_report(gpu_report(), written.parent)
    assert (written.parent / "telemetry.png").exists()
    result = write_report(cpu_report(), written.parent)
    assert result["pictures"]["telemetry"] is None
    assert not (written.parent / "telemetry.png").exists()
    assert "there is no NVIDIA driver here" in (written.parent / "report.html").read_text()


def test_terminal_shows_markup_as_it_stands(capsys):
    report = cpu_report()
    report["verdict"]["sentence"] = "[bold]x[/bold] [/nothing] \x1b[31m"
    print_report(report)
    assert r"[bold]x[/bold] [/nothing] \x1b[31m" in capsys.readouterr().out


def test_comparison_as_a_program(tmp_path):
    for name, report in (("a", cpu_report()), ("b", gpu_report())):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    out = tmp_path / "new" / "folder"
    done = subprocess.run(
        [sys.executable, "profile/report.py", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["differences"]["config.arch"] == ["A", "D"]
    assert result["differences"]["hardware.driver"] == [None, "580.65"]
    assert "git_revision" not in result["differences"]
    assert "config.prefetch" not in result["differences"]
    with Image.open(result["picture"]) as image:
        assert min(image.size) > 500
    assert list(out.iterdir()) == [out / "comparison.png"]


def test_comparison_divides_the_right_way():
    a, b = cpu_report(), cpu_report()
    a["config"]["batch_size"], b["config"]["batch_size"] = 32, 64
    a["stages"]["loader"]["images_per_second"] = {
        "median": 100.0,
        "p5": 90.0,
        "p95": 110.0,
        "count": 9,
        "relative_ci": 0.1,
    }
    b["stages"]["loader"]["images_per_second"] = {
        "median": 125.0,
        "p5": 111.0,
        "p95": 130.0,
        "count": 9,
        "relative_ci": 0.1,
    }
    b["stages"]["step"]["images_per_second"] = {
        "median": 59.2,
        "p5": 50.0,
        "p95": 111.3,
        "count": 9,
        "relative_ci": 0.1,
    }
    b["stages"]["decoding"] = None
    a["step_parts"]["forward"] = {"median": 0.032, "p5": 0.016, "p95": 0.064, "count": 9, "relative_ci": 0.1}
    b["step_parts"]["forward"] = {"median": 0.128, "p5": 0.1216, "p95": 0.1344, "count": 9, "relative_ci": 0.1}
    b["step_parts"]["backward"] = summary(2 * 0.1648 / 1.5, 0.01)
    rows = {row["name"]: row for row in compare(a, b)}

    assert (rows["loader alone"]["times_as_fast"], rows["loader alone"]["spreads_overlap"]) == (1.25, False)
    assert rows["step alone"]["times_as_fast"] == pytest.approx(0.5)
    assert rows["step alone"]["spreads_overlap"] is True  # 111.296 is below 111.3
    assert (rows["decoding alone"]["times_as_fast"], rows["decoding alone"]["spreads_overlap"]) == (None, None)
    # 1 and 2 ms an image: from 0.5 to 2 in A, from 1.9 to 2.1 in B.
    assert rows["forward"]["a"] == pytest.approx([1000, 500, 2000])
    assert rows["forward"]["b"] == pytest.approx([2000, 1900, 2100])
    assert (rows["forward"]["times_as_fast"], rows["forward"]["spreads_overlap"]) == (pytest.approx(0.5), True)
    assert (rows["backward"]["times_as_fast"], rows["backward"]["spreads_overlap"]) == (pytest.approx(1.5), False)

    figure = comparison(list(rows.values()), ["a", "b"])
    marks = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert marks["loader alone"].get_xdata() == [1.25]
    assert "decoding alone" not in marks
    lanes = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    lane = lanes.index("loader alone")
    places = [np.asarray(line.get_xydata()) for line in figure.axes[0].get_lines()]
    bar = next(place for place in places if place[:, 1].tolist() == [lane, lane])
    np.testing.assert_allclose(bar[:, 0], [111 / 110, 130 / 90])
    (_, stages), (_, parts) = comparison_tables(list(rows.values()))
    assert stages[2] == ["loader alone", "100", "90.0–110", "125", "111–130", "× 1.250", "apart"]
    assert parts[1] == ["forward", "1,000", "500–2,000", "2,000", "1,900–2,100", "× 0.500", "overlap"]
    assert differences(a, b) == {"config.batch_size": [32, 64]}


def without(report: dict, *path: str) -> dict:
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return report


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a report"),
        (b'{"program": "roofline", "format": 1}', "not a report"),
        (b'{"program": "throughput", "format": 2}', "a report of format 2, and this program reads format 1"),
        (json.dumps(without(cpu_report(), "stages", "step", "images_per_second", "p5")).encode(), "p5 is missing"),
        (json.dumps(without(cpu_report(), "verdict")).encode(), "verdict is missing"),
        (json.dumps(cpu_report() | {"stages": [1]}).encode(), "stages is not an object"),
        (json.dumps(cpu_report() | {"created": 5}).encode(), "created is not text"),
        (json.dumps(cpu_report()).replace("0.605", "NaN").encode(), "roofline.mfu is not a finite number"),
        (json.dumps(cpu_report()).replace("0.605", "1" + 400 * "0").encode(), "roofline.mfu is not a finite number"),
    ],
)
def test_what_is_no_report_is_said_in_a_sentence(content, words, tmp_path, capsys):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert main([str(path)]) == 2
    assert main([str(path), str(path)]) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {path}: ") and words in line for line in lines)
    assert shown.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_series_of_several_lengths_are_no_report():
    report = gpu_report()
    report["telemetry"]["devices"][1]["series"]["power_watts"].pop()
    with pytest.raises(UserError, match=r"telemetry.devices\[1\].series has lists of several lengths"):
        check_report(report, "x")


def test_three_reports_are_too_many(written, capsys):
    assert main([str(written)] * 3) == 2
    assert "give one to show or two to compare" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [1, 2])
def test_folder_that_cannot_be_written_is_said_in_a_sentence(flags, written, capsys):
    blocked = written.parent / "file"
    blocked.write_text("in the way")
    assert main([*[str(written)] * flags, "--out", str(blocked)]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"error: --out {blocked}: cannot be written (File exists); name another folder"]
    assert shown.out == ""
    assert blocked.read_text() == "in the way"


def test_disk_that_is_full_leaves_the_earlier_files_whole(written, capsys, monkeypatch):
    write_report(cpu_report(), written.parent)
    before = {path: path.read_bytes() for path in written.parent.iterdir()}
    write = io.BufferedWriter.write

    def full(self, content):
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.files.os.fdopen", lambda descriptor, mode: FullDisk(descriptor, mode))
    assert main([str(written)]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in written.parent.iterdir()} == before


class FullDisk(io.FileIO):
    """Takes half of what it is given."""

    def write(self, content) -> int:
        super().write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")
