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

from perf.compare import compare, comparison
from perf.device_pictures import roofline, telemetry
from perf.pictures import GAP, gap_of_step, steps, timeline, waterfall
from perf.plot_style import spread_out
from perf.report import Layer, Report
from perf.show import PICTURES
from tests.support.made_up_report import cpu_report, gpu_report, rate, summary


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


def test_steps_show_every_lap_in_order_and_in_the_histogram():
    report = gpu_report()
    figure = steps(report)
    assert isinstance(figure, Figure)
    strips, histograms = figure.axes[::2], figure.axes[1::2]
    shown = (report.stages.training, report.stages.step, report.stages.loader)
    for strip, histogram, stage in zip(strips, histograms, shown, strict=True):
        assert stage
        series = 1e3 * np.array(stage.series_seconds)
        common, slow = (np.asarray(line.get_xydata()) for line in strip.get_lines()[:2])
        points = np.concatenate([common, slow])
        np.testing.assert_allclose(points[np.argsort(points[:, 0])], np.column_stack([range(len(series)), series]))
        counts = [patch.get_width() for patch in histogram.patches if isinstance(patch, Rectangle)]
        assert sum(counts) == len(series)
    assert len(np.asarray(strips[0].get_lines()[1].get_xydata())) == 4  # the stalls, in a colour of their own
    assert "4 slow, 9 % of the time" in strips[0].get_title(loc="left")
    assert "none is slow" in strips[1].get_title(loc="left")


def test_steps_without_a_loader():
    report = gpu_report()
    report.stages.training = report.stages.loader = None
    figure = steps(report)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2


def test_the_gap_of_a_step_adds_up():
    report = gpu_report()
    layers, floor = report.roofline.layers, report.roofline.floor_seconds.total
    found = gap_of_step(report)
    assert list(found) == list(GAP)
    assert sum(found.values()) == pytest.approx(report.stages.step.step_seconds.mean)
    assert found["floor"] == floor
    # Of the passes alone: the optimizer and the all-reduce have nothing that could be fused; compiling fuses a third.
    moved = sum(layer.bytes_unfused - layer.bytes for layer in layers) / report.roofline.peaks.bytes_per_second
    assert found["memory_passes"] == pytest.approx(moved * 2 / 3, rel=0.05)
    report.config["compile"] = False
    assert gap_of_step(report)["memory_passes"] == pytest.approx(moved, rel=0.05)
    report.config["compile"] = True
    beyond = [(layer.measured_seconds or 0) - layer.floor_seconds_unfused for layer in layers]
    assert found["layers"] == pytest.approx(sum(beyond))

    for layer in layers:  # slower one by one than in the step, which fuses
        layer.measured_seconds = 10 * layer.floor_seconds
    found = gap_of_step(report)
    assert (found["rest"], sum(found.values())) == (0, pytest.approx(report.stages.step.step_seconds.mean))
    for layer in layers:
        layer.measured_seconds = None
    assert gap_of_step(report)["layers"] == 0

    report.stages.step = rate(30_000.0, 512, 2)  # faster than its floor
    assert gap_of_step(report) == {"floor": floor, "memory_passes": 0, "layers": 0, "rest": 0}


def test_waterfall_goes_from_the_hardware_to_training():
    report = gpu_report()
    found, gap = bars(waterfall(report)), gap_of_step(report)
    limit = 512 / gap["floor"]
    fused = 512 / (gap["floor"] + gap["memory_passes"])
    layers = 512 / (gap["floor"] + gap["memory_passes"] + gap["layers"])
    expected = {
        "hardware's limit": (0, limit),
        "unfused passes": (limit, fused - limit),
        "layers below roof": (fused, layers - fused),
        "rest of the step": (layers, 6020 - layers),
        "step alone": (0, 6020),
        "lost to the loader": (6020, -670),
        "ceiling, set by\nthe loader": (0, 5350),
        "lost in the loop": (5350, -170),
        "training achieved": (0, 5180),
    }
    assert list(found) == list(expected)
    for name, span in expected.items():
        assert found[name] == [pytest.approx(span)]
    assert [text for text in texts(waterfall(report)) if "6,020" in text] == ["  6,020/s · 0.166 ms/image"]
    assert [text.strip() for text in texts(waterfall(report)) if "670" in text] == ["−670 (11 %)"]


def test_waterfall_says_what_was_not_measured_and_what_was_gained():
    report = gpu_report()
    report.stages.training = None
    report.stages.step = rate(30_000.0, 512, 2)
    figure = waterfall(report)
    found, limit = bars(figure), 512 / report.roofline.floor_seconds.total
    assert found["training achieved"] == []
    assert [text.strip() for text in texts(figure) if "not measured" in text] == ["not measured"]
    assert found["more than that"] == [(pytest.approx(limit), pytest.approx(30_000 - limit))]


def test_timeline_is_of_the_training_that_it_shows():
    report = gpu_report()
    figure = timeline(report)
    floor, unfused = report.roofline.floor_seconds, report.roofline.floor_seconds_unfused
    forward, backward, later = 1e3 * floor.forward, 1e3 * floor.backward, 1e3 * (floor.forward + floor.backward) + 1.2
    # In ms; floors: unfused, fused. Of an all-reduce of 5.2 ms, the backward pass hides all but 1.2.
    whole = 1e3 * 512 / 5180
    expected: dict[str, list[tuple[float, float]]] = {
        "data wait": [(0, 11.2)],
        "forward": [(11.2, 26.4), (0, 1e3 * unfused.forward), (0, forward)],
        "backward,\nall-reduce": [(37.6, 57.6), (forward, 1e3 * unfused.backward + 1.2), (forward, backward + 1.2)],
        "optimizer": [(95.2, 2.1), (later, 0.83), (later, 0.83)],
        "between these": [(97.3, whole - 97.3)],
        "whole step\nin training": [(0, whole), (0, 1e3 * unfused.total), (0, 1e3 * floor.total)],
    }
    found = bars(figure)
    assert list(found) == list(expected)
    for name, spans in expected.items():
        np.testing.assert_allclose(found[name], spans, rtol=1e-9, atol=1e-9)
    assert "26.4 ms, floor 9.30–12.8" in texts(figure)


def test_timeline_without_images_is_of_the_step_alone():
    report = gpu_report()
    report.training_parts = report.stages.training = None
    found = bars(timeline(report))
    assert list(found) == ["forward", "backward", "all-reduce, exposed", "optimizer", "whole step\nalone"]
    assert found["backward"][0] == (pytest.approx(26.2), pytest.approx(53.7))


def test_timeline_of_one_rank_has_no_all_reduce():
    figure = timeline(cpu_report())
    assert not [name for name in bars(figure) if "all-reduce" in name]
    assert not [text for text in texts(figure) if "not measured" in text]


def test_telemetry_draws_every_sample_and_shades_the_stages():
    report = gpu_report()
    report.telemetry.devices[0].series["power_watts"][3] = None
    figure = telemetry(report)
    assert isinstance(figure, Figure)
    power, utilisation, clocks, memory, temperature = figure.axes
    for place, device in enumerate(report.telemetry.devices):
        series = device.series
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
    for device in report.telemetry.devices:
        device.series["temperature_celsius"] = [None] * 600
    figure = telemetry(report)
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.axes[4].texts] == ["not measured"]


def test_telemetry_without_a_gpu_is_a_sentence():
    sentence = telemetry(cpu_report())
    assert isinstance(sentence, str)
    assert "there is no NVIDIA driver here" in sentence


@pytest.mark.parametrize("make", [cpu_report, gpu_report])
def test_roofline_has_every_layer_where_it_was_measured_and_where_it_could_be(make):
    report = make()
    figure = roofline(report)
    assert isinstance(figure, Figure)
    peaks = report.roofline.peaks
    marks = {
        label: np.concatenate(
            [np.asarray(mark.get_offsets()) for mark in figure.axes[0].collections if mark.get_label() == label]
        )
        for label in ("attainable", "measured")
    }
    assert len(marks["attainable"]) == len(marks["measured"]) >= 8
    attainable = np.minimum(peaks.flops_per_second, peaks.bytes_per_second * marks["attainable"][:, 0])
    np.testing.assert_allclose(marks["attainable"][:, 1], attainable, rtol=0.01)
    conv = next(layer for layer in report.roofline.layers if layer.name == "features.2")  # alone at its place
    place = conv.flops / conv.bytes, conv.flops / conv.measured_seconds
    assert np.abs(np.log(marks["measured"] / place)).max(axis=1).min() < 1e-9
    for layer in report.roofline.layers:
        if layer.flops:
            place = layer.flops / layer.bytes, layer.flops / layer.floor_seconds
            assert np.abs(np.log(marks["attainable"] / place)).max(axis=1).min() < 0.01, layer.name
    step = next(line for line in figure.axes[0].get_lines() if line.get_label() == "whole step")
    np.testing.assert_allclose(np.asarray(step.get_ydata()), report.roofline.mfu * peaks.flops_per_second)

    total = sum(layer.measured_seconds for layer in report.roofline.layers)
    pools = sum(layer.measured_seconds for layer in report.roofline.layers if layer.kind == "pool")
    assert f"pool × 5, {100 * pools / total:.1f} % of the time" in figure.axes[0].get_xlabel()


def test_roofline_of_layers_that_were_not_measured_has_hollow_marks_alone():
    report = gpu_report()
    for layer in report.roofline.layers:
        layer.measured_seconds = None
    figure = roofline(report)
    assert isinstance(figure, Figure)
    assert {mark.get_label() for mark in figure.axes[0].collections} == {"attainable"}
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert sum(label.startswith("features.24, 26, 28 (") for label in labels) == 1


def crowded_report() -> Report:
    """As many layers as there is no room for, names that matplotlib would take for formulas, long ones, tiny and huge values."""
    report = gpu_report()
    report.config["data"] = "/a/very/long/$path$/" + 20 * "of_folders/"
    report.roofline.layers = [
        Layer(
            name=f"b_{place}^$x$",
            kind="conv",
            flops=1.1**place,
            bytes=1.0,
            bytes_unfused=2.0,
            floor_seconds=1e-3 * 1.1**place,
            floor_seconds_unfused=2e-3 * 1.1**place,
            measured_seconds=5e-3 * 1.1**place if place % 2 else None,
        )
        for place in range(120)
    ]
    report.stages.training = rate(0.001, 512, 2, stalls=3)
    report.stages.step = rate(1e6, 512, 2, steps=2000, stalls=40)
    report.step_parts.optimizer = summary(1e-7)
    report.telemetry.stage_seconds = {f"stage{place}": (30 + place, 30.5 + place) for place in range(6)}
    return report


@pytest.mark.parametrize("make", [cpu_report, gpu_report, crowded_report])
@pytest.mark.parametrize("name", [*PICTURES, "comparison"])
@pytest.mark.seconds
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
