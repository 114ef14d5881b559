"""The pictures of a run's hardware: its layers under the roofline, and what NVML saw of each GPU over time.

Williams, Waterman, Patterson: Roofline, an insightful visual performance model. Communications of the ACM 52(4), 2009.
"""

import math
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from perf import plot_style as style
from perf.report import Device, Layer, Report
from perf.words import NOT_MEASURED, STAGES, percent, ratio, subject, text_of, with_prefix

# ---- roofline ----------------------------------------------------------------------------------------------------

_LOOKS = {"conv": (style.BLUE, "o"), "linear": (style.ORANGE, "s")}
_OTHER = (style.GREY, "D")
_LABEL_POINTS = 8.5
# Of the axes' width: a line of the labels' text. The axes take about 6/7 of the figure's width.
_LABEL_DISTANCE = 1.35 * _LABEL_POINTS / 72 / (style.WIDTH_INCHES * 6 / 7)
_MOST_LABELS = math.floor(1 / _LABEL_DISTANCE)


class Group(NamedTuple):
    """Layers of one kind at the same place of the plot. Rates are FLOPs a second."""

    kind: str
    names: list[str]
    intensity: float  # FLOPs a byte
    attainable: float  # by the floor
    measured: float | None
    share: float  # of the time of all layers: measured, or by the floor

    @property
    def label(self) -> str:
        if len(self.names) > 4:
            name = f"{self.kind} × {len(self.names)}"
        else:
            prefix = self.names[0].rpartition(".")[0]
            same = prefix and all(name.rpartition(".")[0] == prefix for name in self.names)
            name = f"{prefix}.{', '.join(n.rpartition('.')[2] for n in self.names)}" if same else ", ".join(self.names)
        return f"{name} ({percent(self.share, 0) if self.share >= 0.005 else '<1 %'})"


def groups_of(layers: list[Layer]) -> list[Group]:
    """Layers with FLOPs, bytes and a floor, those of one kind and one intensity (to 1 %) together, by intensity."""
    seconds_of = _seconds_of(layers)
    total = sum(seconds_of(layer) for layer in layers)
    found: dict[tuple[str, int], list[Layer]] = {}
    for layer in filter(_has_a_place, layers):
        found.setdefault((layer.kind, round(100 * math.log(layer.flops / layer.bytes))), []).append(layer)
    groups = []
    for (kind, _), members in found.items():
        flops = sum(layer.flops for layer in members)
        measured = [layer.measured_seconds for layer in members if layer.measured_seconds is not None]
        groups.append(
            Group(
                kind=text_of(kind),
                names=[text_of(layer.name) for layer in members],
                intensity=flops / sum(layer.bytes for layer in members),
                attainable=flops / sum(layer.floor_seconds for layer in members),
                measured=ratio(flops, sum(measured)) if len(measured) == len(members) else None,
                share=sum(map(seconds_of, members)) / total,
            )
        )
    return sorted(groups, key=lambda group: group.intensity)


def _seconds_of(layers: list[Layer]) -> Callable[[Layer], float]:
    """What a layer's share is of: measured seconds where all have them, the floor's otherwise."""
    measured = all(layer.measured_seconds is not None for layer in layers)
    return attrgetter("measured_seconds" if measured else "floor_seconds")


def roofline(report: Report) -> Figure | str:
    """Measured rates (full marks) below the attainable ones (hollow), by FLOPs a byte; or why there is no picture."""
    layers, peaks, mfu = report.roofline.layers, report.roofline.peaks, report.roofline.mfu
    groups = groups_of(layers)
    if not groups:
        return "No layer has FLOPs, so there is no roofline."
    compute, bandwidth = peaks.flops_per_second, peaks.bytes_per_second
    reached = mfu * compute if mfu else None
    figure = style.new_figure(
        6.2,
        f"Roofline by layer, with each layer's share of their time\n{text_of(peaks.name)}: "
        f"{with_prefix(compute, 'FLOP/s')}, {with_prefix(bandwidth, 'B/s')} ({peaks.source})\n"
        f"Whole step, measured: {with_prefix(reached, 'FLOP/s')} (MFU {percent(mfu)})",
    )
    axes = figure.subplots()
    ridge = compute / bandwidth
    left, right = min(groups[0].intensity, ridge) / 2, max(groups[-1].intensity, ridge) * 2
    axes.plot(
        [left, ridge, right], [left * bandwidth, compute, compute], color=style.BLACK, linewidth=1.5, label="roof"
    )
    for group in groups:
        _draw_group(axes, group)
    looks = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=kind)
        for kind, (colour, marker) in {group.kind: _LOOKS.get(group.kind, _OTHER) for group in groups}.items()
    ]
    looks.append(Line2D([], [], color=style.GREY, marker="o", linestyle="", fillstyle="none", label="attainable"))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylabel="FLOP/s of one device: measured, attainable")
    rates = [rate for group in groups for rate in (group.attainable, group.measured) if rate]
    if reached:
        rates.append(reached)
        axes.plot(
            [reached / bandwidth, right], [reached] * 2, color=style.VERMILION, linestyle="--", label="whole step"
        )
    bottom, top = min(rates) / 3, max(compute, *rates) * 2
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 100 else (1,)))
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("arithmetic intensity, FLOP/byte (fused)" + _without_a_place(layers), parse_math=False)
    axes.grid(alpha=0.3)
    _label(axes, groups)
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(handles=[*lines, *looks], loc="outside lower center", ncols=6, frameon=False, columnspacing=1.2)
    return figure


def _draw_group(axes: Axes, group: Group) -> None:
    """A full mark where it is, a hollow one where it could be, and a line between the two."""
    colour, marker = _LOOKS.get(group.kind, _OTHER)
    place, size = [group.intensity], [25 + 500 * group.share]
    axes.scatter(place, [group.attainable], size, "none", marker=marker, edgecolor=colour, zorder=3, label="attainable")
    if group.measured is not None:
        axes.plot(place * 2, [group.attainable, group.measured], color=colour, linewidth=0.8)
        full = axes.scatter(place, [group.measured], size, colour, marker=marker, edgecolor="white", label="measured")
        full.set(alpha=0.75, zorder=3)


def _label(axes: Axes, groups: list[Group]) -> None:
    """In one row above the roof, where nothing else is; those with the largest shares, if there is no room for all."""
    largest = sorted(groups, key=lambda group: -group.share)[:_MOST_LABELS]
    labelled = [group for group in groups if group in largest]
    points = [(group.intensity, group.attainable) for group in labelled]
    look = {"height": 1.02, "distance": _LABEL_DISTANCE, "rotation": 90, "fontsize": _LABEL_POINTS}
    style.row_above(axes, [group.label for group in labelled], points, **look)


def _without_a_place(layers: list[Layer]) -> str:
    """A line that names the layers that a logarithmic plot cannot show, with their share of the time."""
    missing = [layer for layer in layers if not _has_a_place(layer)]
    if not missing:
        return ""
    kinds = Counter(text_of(layer.kind) for layer in missing)
    counts = ", ".join(f"{kind} × {count}" for kind, count in sorted(kinds.items()))
    seconds_of = _seconds_of(layers)
    share = ratio(sum(map(seconds_of, missing)), sum(map(seconds_of, layers)))
    return f"\nwithout a place here (no FLOPs): {counts}, {percent(share)} of the time"


def _has_a_place(layer: Layer) -> bool:
    return layer.flops > 0 and layer.bytes > 0 and layer.floor_seconds > 0


# ---- telemetry ---------------------------------------------------------------------------------------------------

_NO_GPU = "No telemetry: {reason}. So there are no curves of power, utilisation, clocks, memory and temperature."
_STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")


_UTILISATION = "utilisation\n%"
_MEMORY_USED = "memory used\nGiB"
PANELS = {
    "power\nW": {"power_watts": ""},
    _UTILISATION: {
        "sm_utilisation_percent": "SM",
        "memory_utilisation_percent": "memory",
        "jpeg_engine_utilisation_percent": "JPEG engine",
    },
    "clocks\nMHz": {"sm_clock_mhz": "SM", "memory_clock_mhz": "memory"},
    _MEMORY_USED: {"memory_used_bytes": ""},
    "temperature\n°C": {"temperature_celsius": ""},
}
"""By title: series of the report, and what the legend calls each."""


def telemetry(report: Report) -> Figure | str:
    """The picture, or a sentence that says why there is none."""
    found = report.telemetry
    if not found.devices:
        return _NO_GPU.format(reason=text_of(found.reason or "it was not measured").rstrip("."))
    devices = [device for device in found.devices if device.series.get("seconds")]
    if not devices:
        return _NO_GPU.format(reason="not one sample was taken")
    figure = style.new_figure(8.6, f"Telemetry of the GPUs\n{subject(report)}")
    all_axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, (title, names) in zip(all_axes, PANELS.items(), strict=True):
        _draw_panel(axes, title, names, devices)
    seconds = [second for device in devices for second in device.series["seconds"] if second is not None]
    first, last = min(seconds), max(seconds)
    figure.align_ylabels(all_axes)
    all_axes[-1].set(xlim=(first, max(last, first + 1e-3)), xlabel="seconds from the start of the sampling")
    spans = sorted(found.stage_seconds.items(), key=lambda item: item[1])
    for _, (start, end) in spans:
        for axes in all_axes:
            axes.axvspan(start, end, color=style.PALE, zorder=0)
    labels = [STAGES.get(stage, text_of(stage)).removesuffix(" alone") for stage, _ in spans]
    top = all_axes[0].get_ylim()[1]
    style.row_above(
        all_axes[0], labels, [(sum(span) / 2, top) for _, span in spans], height=1.12, distance=0.13, fontsize=9
    )
    if len(devices) > 1:
        handles = [Line2D([], [], color=_colour(index)) for index in range(len(devices))]
        several = len({device.machine for device in devices}) > 1
        labels = [f"machine {device.machine}, " * several + f"GPU {device.index}" for device in devices]
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if several else 4, frameon=False)
    return figure


def _draw_panel(axes: Axes, title: str, names: dict[str, str], devices: list[Device]) -> None:
    known = {key for device in devices for key, values in device.series.items() if any(v is not None for v in values)}
    curves = dict(zip([key for key in names if key in known], _STYLES, strict=False))
    scale = 1 / 2**30 if title == _MEMORY_USED else 1.0
    for index, device in enumerate(devices):
        # The first ones wide, so that none hides all of another.
        look: dict[str, Any] = {"color": _colour(index), "linewidth": 1.2 + 1.6 * (1 - (index + 1) / len(devices))}
        for key, dashes in curves.items():
            seconds = np.array(device.series["seconds"], dtype=float)
            heights = np.array(device.series.get(key) or [None] * len(seconds), dtype=float)  # None is nan
            axes.plot(seconds, scale * heights, dashes, label=key, **look)
    axes.set_ylabel(title)
    axes.set_ylim(0, 105 if title == _UTILISATION else 1.1 * axes.dataLim.y1 if curves else 1)
    axes.grid(alpha=0.3)
    if not curves:
        axes.text(0.5, 0.5, NOT_MEASURED, transform=axes.transAxes, ha="center", va="center", color=style.GREY)
        axes.set_yticks([])
    elif len(names) > 1:
        lines = [
            Line2D([], [], color=style.BLACK, linestyle=dashes, label=names[key]) for key, dashes in curves.items()
        ]
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderpad": 0, "borderaxespad": 0.2}
        axes.legend(handles=lines, ncols=3, frameon=False, fontsize=9, **place)


def _colour(index: int) -> str:
    return style.DEVICE_COLOURS[index % len(style.DEVICE_COLOURS)]
