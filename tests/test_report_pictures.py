"""The pictures of a report: their bars, lines and marks are the report's numbers, and their words can be read."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from scipy.optimize import minimize

from perf.compare_reports import compare, comparison
from perf.plot_roofline import roofline
from perf.plot_style import spread_out
from perf.plot_telemetry import telemetry
from perf.plot_timeline import timeline
from perf.plot_waterfall import waterfall
from perf.show import PICTURES
from tests.made_up_report import cpu_report, gpu_report, summary


def bars(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """(left, width) of the horizontal bars, by the label of the axes' lane in which they lie; in the order drawn."""
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for patch in axes.patches:
        assert isinstance(patch, Rectangle)
        lane = round(patch.get_y() + patch.get_height() / 2)
        found[names[lane]].append((patch.get_x(), patch.get_width()))
    return found


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def test_waterfall_goes_from_the_hardware_to_training():
    figure = waterfall(gpu_report())
    assert isinstance(figure, Figure)
    limit = 512 / 0.03843
    assert bars(figure) == {
        "hardware's limit": [(0, pytest.approx(limit))],
        "lost in the step": [(pytest.approx(limit), pytest.approx(6020 - limit))],
        "step alone": [(0, 6020)],
        "lost to the loader": [(6020, -670)],
        "ceiling, set by\nthe loader": [(0, 5350)],
        "lost in the loop": [(5350, -170)],
        "training achieved": [(0, 5180)],
    }
    assert [text for text in texts(figure) if "6,020" in text] == ["  6,020/s · 0.166 ms/image"]
    assert [text.strip() for text in texts(figure) if "670" in text] == ["−670 (11 %)"]


def test_waterfall_says_what_was_not_measured_and_what_was_gained():
    report = gpu_report()
    report["stages"]["training"] = None
    report["stages"]["step"]["images_per_second"] = summary(14_000.0)
    figure = waterfall(report)
    assert isinstance(figure, Figure)
    found = bars(figure)
    assert found["training achieved"] == []
    assert [text.strip() for text in texts(figure) if "not measured" in text] == ["not measured"]
    assert found["more than that"] == [(pytest.approx(512 / 0.03843), pytest.approx(14_000 - 512 / 0.03843))]


def test_timeline_shows_each_part_where_it_starts():
    report = gpu_report()
    figure = timeline(report)
    assert isinstance(figure, Figure)
    # In ms: data wait, forward, backward, all-reduce and optimizer, measured; the floor has an all-reduce of 5.2 ms, of which
    # the backward pass hides all but 38.43 − 12.1 − 24.3 − 0.83 = 1.2 ms. Training takes 512 / 5180 s.
    expected: dict[str, list[tuple[float, float]]] = {
        "data wait": [(0, 11.2)],
        "forward": [(11.2, 26.2), (0, 12.1)],
        "backward": [(37.4, 53.7), (12.1, 24.3)],
        "all-reduce, exposed": [(91.1, 3.1), (36.4, 1.2)],
        "optimizer": [(94.2, 2.04), (37.6, 0.83)],
        "in none of these": [(96.24, 1e3 * 512 / 5180 - 96.24)],
        "whole step\nin training": [(0, 1e3 * 512 / 5180), (0, 38.43)],
    }
    found = bars(figure)
    assert list(found) == list(expected)
    for name, spans in expected.items():
        np.testing.assert_allclose(found[name], spans, rtol=1e-9, atol=1e-9)
    assert "53.7 ms, floor 24.3" in texts(figure)


def test_timeline_of_one_rank_has_no_all_reduce():
    figure = timeline(cpu_report())
    assert isinstance(figure, Figure)
    assert "all-reduce, exposed" not in bars(figure)
    assert not [text for text in texts(figure) if "not measured" in text]


def test_telemetry_draws_every_sample_and_shades_the_stages():
    report = gpu_report()
    report["telemetry"]["devices"][0]["series"]["power_watts"][3] = None
    figure = telemetry(report)
    assert isinstance(figure, Figure)
    power, utilisation, clocks, memory, temperature = figure.axes
    for place, device in enumerate(report["telemetry"]["devices"]):
        series = device["series"]
        line = power.get_lines()[place]
        np.testing.assert_array_equal(line.get_xdata(), series["seconds"])
        np.testing.assert_array_equal(line.get_ydata(), np.array(series["power_watts"], dtype=float))
        np.testing.assert_allclose(
            np.asarray(memory.get_lines()[place].get_ydata()), np.array(series["memory_used_bytes"]) / 2**30
        )
    assert np.isnan(np.asarray(power.get_lines()[0].get_ydata())[3])
    assert len(utilisation.get_lines()) == 2 * 3
    assert len(clocks.get_lines()) == 2 * 2
    assert np.isnan(np.asarray(temperature.get_lines()[1].get_ydata())).all()
    for axes in figure.axes:
        spans = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        shaded = [(span.get_x(), span.get_x() + span.get_width()) for span in spans]
        assert shaded == [(2, 7), (8, 13), (14, 22), (24, 39), (41, 60)]
    names = {"reading", "decoding", "loader", "step", "training", "GPU 0", "GPU 1"}
    assert names <= set(texts(figure))


def test_telemetry_says_what_no_gpu_could_tell():
    report = gpu_report()
    for device in report["telemetry"]["devices"]:
        device["series"]["temperature_celsius"] = [None] * 600
    figure = telemetry(report)
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.axes[4].texts] == ["not measured"]


def test_telemetry_without_a_gpu_is_a_sentence():
    sentence = telemetry(cpu_report())
    assert isinstance(sentence, str)
    assert "there is no NVIDIA driver here" in sentence


@pytest.mark.parametrize("make", [cpu_report, gpu_report])
def test_roofline_has_every_layer_with_flops_at_its_place(make):
    report = make()
    figure = roofline(report)
    assert isinstance(figure, Figure)
    peaks = report["roofline"]["peaks"]
    marks = np.concatenate([np.asarray(marks.get_offsets()) for marks in figure.axes[0].collections])
    for layer in report["roofline"]["layers"]:
        if layer["flops"]:
            place = layer["flops"] / layer["bytes"], layer["flops"] / layer["floor_seconds"]
            assert np.abs(np.log(marks / place)).max(axis=1).min() < 0.01, layer["name"]
    attainable = np.minimum(peaks["flops_per_second"], peaks["bytes_per_second"] * marks[:, 0])
    np.testing.assert_allclose(marks[:, 1], attainable, rtol=0.01)
    step = next(line for line in figure.axes[0].get_lines() if line.get_label() == "whole step")
    np.testing.assert_allclose(np.asarray(step.get_ydata()), report["roofline"]["mfu"] * peaks["flops_per_second"])

    total = sum(layer["floor_seconds"] for layer in report["roofline"]["layers"])
    pools = sum(layer["floor_seconds"] for layer in report["roofline"]["layers"] if layer["kind"] == "pool")
    assert f"pool × 5, {100 * pools / total:.1f} % of the floor" in figure.axes[0].get_xlabel()
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert sum(label.startswith("relu × 13") for label in labels) == 1
    assert sum(label.startswith("features.24, 26, 28 (") for label in labels) == 1


def crowded_report() -> dict:
    """As many layers as there is no room for, names that matplotlib would take for formulas, long ones, tiny and huge values."""
    report = gpu_report()
    report["config"]["data"] = "/a/very/long/$path$/" + 20 * "of_folders/"
    report["roofline"]["layers"] = [
        {
            "name": f"b_{place}^$x$",
            "kind": "conv",
            "flops": 1.1**place,
            "bytes": 1.0,
            "floor_seconds": 1e-3 * 1.1**place,
        }
        for place in range(120)
    ]
    report["stages"]["training"]["images_per_second"] = summary(0.001)
    report["step_parts"]["optimizer"] = summary(1e-7)
    report["telemetry"]["stage_seconds"] = {f"stage{place}": [30 + place, 30.5 + place] for place in range(6)}
    return report


@pytest.mark.parametrize("make", [cpu_report, gpu_report, crowded_report])
@pytest.mark.parametrize("name", [*PICTURES, "comparison"])
def test_no_text_overlaps_another_or_leaves_the_picture(make, name, monkeypatch):
    if name == "comparison":
        figure = comparison(compare(cpu_report(), make()), ["a/report.json", "b/" * 90])
    else:
        drawn = PICTURES[name](make())
        if isinstance(drawn, str):
            return
        figure = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays everything out
    drawn_texts: list[Text] = []
    draw = Text.draw

    def draw_and_note(text: Text, renderer: RendererBase) -> None:
        drawn_texts.append(text)
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", draw_and_note)
    canvas.draw()
    # Of the text, without the line that leads from it.
    boxes = [
        (text.get_text(), Text.get_window_extent(text))
        for text in drawn_texts
        if text.get_visible() and text.get_text()
    ]
    assert len(boxes) > 10
    assert not any(
        text.get_parse_math() for text in drawn_texts if "$path$" in text.get_text() or "$x$" in text.get_text()
    )
    for (one, a), (other, b) in combinations(boxes, 2):
        common = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(common) < 1, (one, other)
    for one, box in boxes:
        assert box.x0 > -1, one
        assert box.y0 > -1, one
        assert box.x1 < figure.bbox.width + 1, one
        assert box.y1 < figure.bbox.height + 1, one


def test_labels_are_spread_as_little_as_possible():
    generator = np.random.default_rng(0)
    distance = 0.09
    for wanted in (np.sort(generator.uniform(0, 1, 8)), np.full(5, 0.98), np.linspace(0.1, 0.9, 4)):
        count = len(wanted)
        found = np.array(spread_out(wanted.tolist(), distance, 0.05, 0.95))
        best = minimize(
            lambda places, wanted: ((places - wanted) ** 2).sum(),
            np.linspace(0.05, 0.95, count),
            args=(wanted,),
            bounds=[(0.05, 0.95)] * count,
            constraints={"type": "ineq", "fun": lambda places, *_: np.diff(places) - distance},
            options={"ftol": 1e-12},
        )
        assert best.success
        np.testing.assert_allclose(found, best.x, atol=1e-4)
