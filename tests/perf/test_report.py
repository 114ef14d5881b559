"""profile/report.py: what it writes, what it prints, what it divides, and what it says of files that are no reports."""

import functools
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from perf.compare import (
    FASTER,
    SLOWER,
    UNDECIDED,
    compare,
    comparison,
    comparison_tables,
    differences,
    interval_of_ratio,
)
from perf.report import Rate, Report, read_report
from perf.show import main, print_report, write_report
from perf.throughput import epoch_costs
from perf.timing import interval_of_mean, thinned
from perf.words import slow_laps
from tests.support.made_up_report import cpu_report, gpu_report, rate, summary

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written(tmp_path) -> Path:
    (tmp_path / "report.json").write_bytes(msgspec.json.encode(gpu_report()))
    return tmp_path / "report.json"


def test_a_report_comes_back_as_it_was(written):
    assert read_report(written) == gpu_report()
    written.write_bytes(msgspec.json.encode(cpu_report()))
    assert read_report(written) == cpu_report()


@pytest.mark.seconds
def test_report_writes_a_page_and_pictures(written, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main([str(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["bound"] == "input"
    assert list(result["pictures"]) == ["steps", "waterfall", "timeline", "telemetry", "roofline"]
    html = Path(result["page"]).read_text()
    for path in result["pictures"].values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            colours = image.convert("RGB").getcolors(1 << 24)
            assert min(image.size) > 500
            assert colours is not None
            assert len(colours) > 50
    assert html.count("data:image/png;base64,") == 5
    table = "\n".join(lines)
    assert gpu_report().verdict.sentence in table
    assert "5,180 images/s in training; 95 % confidence: 5,107–5,253." in table
    step = gpu_report().stages.step.step_seconds
    spread = f"{1e3 * step.p5:.1f}–{1e3 * step.p95:.1f}"
    words = ["step", "alone", "6,020", "6,002–6,038", "3,010", "(rank", "0)", "85.0", spread, "none", "120"]
    assert any(line.split() == words for line in lines)
    assert any(line.split() == ["backward", "57.6", "56.4–59.3", "53.7", "18.6", "25.5"] for line in lines)


def test_slow_steps_are_counted_with_the_time_they_took(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    report = gpu_report()
    training = report.stages.training
    assert training
    slow = sorted(training.series_seconds)[-4:]
    print_report(report)
    shown = capsys.readouterr().out
    assert f"4, {100 * sum(slow) / training.seconds:.0f} % of the time" in shown
    assert f"4 took over twice the median: {100 * sum(slow) / training.seconds:.1f} % of the time" in " ".join(
        shown.split()
    )


def test_a_stall_in_a_thinned_series_takes_no_more_time_than_it_took():
    """A value of a series that is too long to keep is the stall itself, though it stands for ten laps."""
    series = np.full(20_000, 0.01)
    series[::400] = 0.1
    values, neighbours = thinned(series)
    seconds, median = float(series.sum()), float(np.median(series))
    steps = msgspec.structs.replace(summary(0.01), median=median)
    long = msgspec.structs.replace(
        rate(100, 1), series_seconds=values, steps_a_lap=neighbours, seconds=seconds, step_seconds=steps
    )
    slow, share = slow_laps(long)
    assert (neighbours, slow) == (10, 50)
    assert share == pytest.approx(50 * (0.1 + 9 * 0.01) / seconds)


def test_terminal_shows_what_was_asked_of_it_for_a_price(capsys):
    report = gpu_report()
    assert report.costs
    report.costs.price, report.costs.price_basis, report.costs.epochs = 12.5, "--price-per-hour 12", 10
    print_report(report)
    assert any(
        line.split() == ["price,", "--price-per-hour", "12", "12.5", "125"]
        for line in capsys.readouterr().out.splitlines()
    )


def test_terminal_shows_cautions_and_how_sure_the_figure_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report = cpu_report()
    print_report(report)
    shown = capsys.readouterr().out
    assert "Caution: Other programs kept up to 0.4 of the 2 cores busy" in shown
    assert "± 1.3 %: 41 steps in 12.0 s, 95 % confidence; the time was up before" in shown
    report.stages.training = rate(100.0, 32, stopped_by="steps", relative_ci=None, steps=3)
    print_report(report)
    shown = capsys.readouterr().out
    assert "unknown: 3 steps in 0.960 s, too few for a confidence interval; the steps were used up before" in shown
    assert "confidence:" not in shown


@pytest.mark.seconds
def test_report_of_a_cpu_run_leaves_no_picture_of_an_earlier_one(written, capsys):
    write_report(gpu_report(), written.parent)
    assert (written.parent / "telemetry.png").exists()
    result = write_report(cpu_report(), written.parent)
    assert result["pictures"]["telemetry"] is None
    assert not (written.parent / "telemetry.png").exists()
    assert "there is no NVIDIA driver here" in (written.parent / "report.html").read_text()


def test_terminal_shows_markup_as_it_stands(capsys):
    report = cpu_report()
    report.verdict.sentence = "[bold]x[/bold] [/nothing] \x1b[31m"
    print_report(report)
    assert r"[bold]x[/bold] [/nothing] \x1b[31m" in capsys.readouterr().out


def test_comparison_as_a_program(tmp_path):
    for name, report in (("a", cpu_report()), ("b", gpu_report())):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(report))
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


def rate_of(images_per_second: float, low: float, high: float) -> Rate:
    found = rate(images_per_second, 64)
    found.interval = low, high
    return found


def test_comparison_divides_the_right_way():
    a, b = cpu_report(), cpu_report()
    a.config["batch_size"], b.config["batch_size"] = 32, 64
    a.stages.loader, b.stages.loader = rate_of(100.0, 97.0, 103.0), rate_of(125.0, 121.0, 129.0)
    a.stages.training, b.stages.training = rate_of(100.0, 97.0, 103.0), rate_of(96.0, 93.0, 99.0)
    b.stages.step = rate_of(59.2, 58.0, 60.0)
    b.stages.decoding = None
    b.stages.reading = rate(41_000.0, 64, relative_ci=None)
    a.step_parts.forward, b.step_parts.forward = summary(0.032), summary(0.128)
    a.step_parts.forward.median = 1.0  # nobody looks at it
    b.step_parts.backward = summary(2 * 0.1648 / 1.5)
    rows = {row.name: row for row in compare(a, b)}

    loader = rows["loader alone"]
    assert (loader.a, loader.b, loader.times_as_fast, loader.verdict) == (100, 125, 1.25, FASTER)
    # On the logarithmic scale, the errors add up in squares.
    half = math.sqrt(math.log(103 / 100) ** 2 + math.log(125 / 121) ** 2)
    assert loader.interval == pytest.approx(
        (1.25 * math.exp(-half), 1.25 * math.exp(math.hypot(math.log(100 / 97), math.log(129 / 125))))
    )
    assert rows["training"].verdict == UNDECIDED  # 0.92 to 1.002
    assert (rows["step alone"].times_as_fast, rows["step alone"].verdict) == (pytest.approx(0.5), SLOWER)
    assert rows["decoding alone"].times_as_fast is rows["decoding alone"].verdict is None
    reading = rows["reading alone"]
    assert (reading.times_as_fast, reading.interval, reading.verdict) == (41_000 / 41_250, None, None)
    # 1 and 2 ms an image.
    assert (rows["forward"].a, rows["forward"].b) == (1000, 2000)
    assert rows["forward"].times_as_fast == pytest.approx(0.5)
    assert rows["backward"].times_as_fast == pytest.approx(1.5)

    figure = comparison(list(rows.values()), ["a", "b"])
    marks = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert marks["loader alone"].get_xdata() == [1.25]
    assert "decoding alone" not in marks
    lanes = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    lane = lanes.index("loader alone")
    places = [np.asarray(line.get_xydata()) for line in figure.axes[0].get_lines()]
    bar = next(place for place in places if place[:, 1].tolist() == [lane, lane])
    assert loader.interval
    np.testing.assert_allclose(bar[:, 0], loader.interval)
    stages, parts = comparison_tables(list(rows.values()), a, b)
    interval = "–".join(f"{end:.3f}" for end in loader.interval)
    assert list(stages[2].values()) == [
        "loader alone",
        "100",
        "97.0–103",
        "125",
        "121–129",
        "× 1.250",
        interval,
        "faster",
    ]
    assert stages[4]["B is"] == "no difference shown"
    assert list(parts[1].values()) == ["forward", "1,000", "2,000", "× 0.500"]
    assert differences(a, b) == {"config.batch_size": [32, 64]}


def test_the_interval_of_a_ratio_holds_the_true_one():
    """Of two runs whose steps are drawn with means of 2 and 3, each rate with the interval that a report gives it."""
    generator = np.random.default_rng(0)
    held = decided = 0
    for _ in range(400):
        found = []
        for mean in (2.0, 3.0):
            series = (mean * generator.gamma(4, 1 / 4, 200)).tolist()
            low, high = interval_of_mean(series) or (0.0, 0.0)
            found.append(rate_of(1 / float(np.mean(series)), 1 / high, 1 / low))
        interval = interval_of_ratio(found[0], found[1])
        assert interval
        held += interval[0] <= 1.5 <= interval[1]
        decided += interval[0] > 1
    assert 0.91 < held / 400 < 0.99
    assert decided == 400


def without(report: Report, *path: str) -> bytes:
    plain = inner = json.loads(msgspec.json.encode(report))
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(plain).encode()


def replaced(report: Report, **values: object) -> bytes:
    return json.dumps(json.loads(msgspec.json.encode(report)) | values).encode()


MFU = f'"mfu":{cpu_report().roofline.mfu}'.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a report"),
        (b'{"program": "roofline", "format": 2}', "not a report"),
        (b'{"program": "throughput", "format": 1}', "of format 1, not 2; show it with the revision that wrote it"),
        (without(cpu_report(), "stages", "step", "interval"), "missing required field `interval` - at `$.stages.step`"),
        (without(cpu_report(), "verdict"), "missing required field `verdict`"),
        (replaced(cpu_report(), stages=[1]), "Expected `object`, got `array` - at `$.stages`"),
        (replaced(cpu_report(), created=5), "Expected `str`, got `int` - at `$.created`"),
        (replaced(cpu_report(), speed=5), "unknown field `speed`"),
        (msgspec.json.encode(cpu_report()).replace(MFU, b'"mfu":NaN'), "not JSON"),
        (
            msgspec.json.encode(cpu_report()).replace(MFU, b'"mfu":1' + 400 * b"0"),
            "Number out of range - at `$.roofline.mfu`",
        ),
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


def test_series_of_several_lengths_are_no_report(written):
    report = gpu_report()
    report.telemetry.devices[1].series["power_watts"].pop()
    written.write_bytes(msgspec.json.encode(report))
    with pytest.raises(UserError, match="Lists of several lengths"):
        read_report(written)


def test_an_epochs_time_energy_and_price():
    known = functools.partial(epoch_costs, images=1_281_167, epochs=74, images_per_second=5180.0)
    costs = known(images_per_joule=4.31, price_per_hour=12.0)
    # By hand: 1,281,167 / 5,180 = 247.33 s, of which 3,600 cost 12; 297,255 J.
    assert (costs.epochs, costs.seconds) == (74, pytest.approx(247.33, abs=0.005))
    assert (costs.price, costs.price_basis) == (pytest.approx(0.82443, rel=1e-4), "--price-per-hour 12")
    assert costs.joules == pytest.approx(297_255, rel=1e-5)
    costs = known(images_per_joule=4.31, price_per_kwh=0.3)
    assert costs.price == pytest.approx(0.3 * 297_255 / 3_600_000, rel=1e-4)
    costs = known(images_per_joule=None, price_per_kwh=0.3)
    assert (costs.joules, costs.price, costs.price_basis) == (None, None, "--price-per-kwh 0.3")
    assert known(images_per_joule=4.31).price_basis is None


def test_three_reports_are_too_many(written, capsys):
    assert main([str(written)] * 3) == 2
    assert "give one to show or two to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("config", "batch_size"), None, "config.batch_size"),
        (("config", "batch_size"), 0, "config.batch_size"),
        (("config", "batch_size"), "x", "config.batch_size"),
        (("stages", "step", "images_per_second_per_rank"), [], "images_per_second_per_rank"),
        (("memory", "total_bytes"), 0, "total_bytes"),
        (("stages", "step", "images_per_second"), 0.0, "images_per_second"),
    ],
)
def test_values_that_nothing_can_be_divided_by_are_refused(place, value, words, written):
    content = json.loads(written.read_text())
    functools.reduce(lambda inner, key: inner[key], place[:-1], content)[place[-1]] = value
    written.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_report(written)


@pytest.mark.parametrize("flags", [1, 2])
@pytest.mark.seconds
def test_folder_that_cannot_be_written_is_said_in_a_sentence(flags, written, capsys):
    blocked = written.parent / "file"
    blocked.write_text("in the way")
    assert main([*[str(written)] * flags, "--out", str(blocked)]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"error: {blocked}: cannot be written (File exists); choose another --out"]
    assert shown.out == ""
    assert blocked.read_text() == "in the way"


@pytest.mark.seconds
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
