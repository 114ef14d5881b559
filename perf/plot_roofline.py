"""The roofline by layer: what rate each layer's FLOPs a byte allow, and how much of the step's floor it makes up.

Williams, Waterman, Patterson: Roofline, an insightful visual performance model. Communications of the ACM 52(4), 2009.
"""

import math
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from perf.plot_style import BLACK, BLUE, GREY, ORANGE, VERMILION, WIDTH_INCHES, new_figure, spread_out
from perf.report_format import find
from perf.report_words import percent, text_of, with_prefix

_LOOKS = {"conv": (BLUE, "o"), "linear": (ORANGE, "s")}
_OTHER = (GREY, "D")
_LABEL_POINTS = 8.5
# Of the axes' width: a line of the labels' text. The axes take about 6/7 of the figure's width.
_LABEL_DISTANCE = 1.35 * _LABEL_POINTS / 72 / (WIDTH_INCHES * 6 / 7)
_MOST_LABELS = math.floor(1 / _LABEL_DISTANCE)


@dataclass(frozen=True)
class Group:
    """Layers of one kind at the same place of the plot."""

    kind: str
    names: tuple[str, ...]
    intensity: float
    """FLOPs a byte."""
    flops_per_second: float
    """Attainable."""
    floor_share: float
    """Of the floor of all layers."""

    @property
    def label(self) -> str:
        if len(self.names) > 4:
            name = f"{self.kind} × {len(self.names)}"
        else:
            prefix = self.names[0].rpartition(".")[0]
            same = prefix and all(name.rpartition(".")[0] == prefix for name in self.names)
            name = f"{prefix}.{', '.join(n.rpartition('.')[2] for n in self.names)}" if same else ", ".join(self.names)
        return f"{name} ({percent(self.floor_share, 0) if self.floor_share >= 0.005 else '<1 %'})"


def groups_of(layers: list[dict]) -> list[Group]:
    """Layers with FLOPs, bytes and a floor, those of one kind and intensity (to 1 %) and rate together, by intensity."""
    total = sum(layer["floor_seconds"] or 0 for layer in layers)
    found: dict[tuple, list[dict]] = {}
    for layer in layers:
        if _has_a_place(layer):
            key = layer["kind"], round(100 * math.log(layer["flops"] / layer["bytes"]))
            found.setdefault(key, []).append(layer)
    groups = []
    for (kind, _), members in found.items():
        flops, size, seconds = (sum(member[key] for member in members) for key in ("flops", "bytes", "floor_seconds"))
        names = tuple(text_of(member["name"]) for member in members)
        groups.append(Group(kind, names, flops / size, flops / seconds, seconds / total))
    return sorted(groups, key=lambda group: group.intensity)


def roofline(report: dict) -> Figure | str:
    """The picture, or why there is none."""
    layers, peaks = find(report, "roofline.layers") or [], find(report, "roofline.peaks") or {}
    groups = groups_of(layers)
    compute, bandwidth = peaks.get("flops_per_second") or 0, peaks.get("bytes_per_second") or 0
    if not groups or compute <= 0 or bandwidth <= 0:
        return "The layers' costs or the hardware's peaks are not known, so there is no roofline."
    mfu = find(report, "roofline.mfu")
    reached = mfu * compute if mfu and mfu > 0 else None
    figure = new_figure(
        5.8,
        f"Roofline by layer, with each layer's share of the floor\n{peaks['name']}: {with_prefix(compute, 'FLOP/s')}, "
        f"{with_prefix(bandwidth, 'B/s')} ({peaks['source']})\n"
        f"Whole step, measured: {with_prefix(reached, 'FLOP/s')} (MFU {percent(mfu)})",
    )
    axes = figure.subplots()
    ridge = compute / bandwidth
    left = min(groups[0].intensity, ridge) / 2
    right = max(groups[-1].intensity, ridge) * 2
    axes.plot([left, ridge, right], [left * bandwidth, compute, compute], color=BLACK, linewidth=1.5, label="roof")
    looks = []
    for kind in dict.fromkeys(group.kind for group in groups):
        colour, marker = _LOOKS.get(kind, _OTHER)
        of_kind = [group for group in groups if group.kind == kind]
        axes.scatter(
            [group.intensity for group in of_kind],
            [group.flops_per_second for group in of_kind],
            [25 + 500 * group.floor_share for group in of_kind],
            color=colour,
            marker=marker,
            alpha=0.75,
            edgecolor="white",
            zorder=3,
            label=kind,
        )
        looks.append(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=kind))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylabel="attainable FLOP/s of one device")
    lowest = min(group.flops_per_second for group in groups)
    if reached:
        lowest = min(lowest, reached)
        axes.plot([reached / bandwidth, right], [reached] * 2, color=VERMILION, linestyle="--", label="whole step")
    bottom, top = lowest / 3, compute * 2
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 100 else (1,)))
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("arithmetic intensity, FLOP/byte" + _without_a_place(layers), parse_math=False)
    axes.grid(alpha=0.3)
    _label(axes, groups, left, right)
    figure.legend(
        handles=[*axes.get_lines(), *looks], loc="outside lower center", ncols=6, frameon=False, columnspacing=1.2
    )
    return figure


def _label(axes, groups: list[Group], left: float, right: float) -> None:
    """In one row above the roof, where nothing else is; those with the largest floors, if there is no room for all."""
    largest = sorted(groups, key=lambda group: -group.floor_share)[:_MOST_LABELS]
    labelled = [group for group in groups if group in largest]
    wanted = [math.log(group.intensity / left) / math.log(right / left) for group in labelled]
    half = _LABEL_DISTANCE / 2
    for group, place in zip(labelled, spread_out(wanted, _LABEL_DISTANCE, half, 1 - half), strict=True):
        axes.annotate(
            group.label,
            xy=(group.intensity, group.flops_per_second),
            xytext=(place, 1.02),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=_LABEL_POINTS,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0.5, 0), "shrinkB": 3},
            parse_math=False,
        )


def _without_a_place(layers: list[dict]) -> str:
    """A line that names the layers that a logarithmic plot cannot show, with their share of the floor."""
    missing = [layer for layer in layers if not _has_a_place(layer)]
    if not missing:
        return ""
    total = sum(layer["floor_seconds"] or 0 for layer in layers)
    kinds = {layer["kind"] for layer in missing}
    counts = ", ".join(
        f"{kind} × {sum(layer['kind'] == kind for layer in missing)}" for kind in sorted(map(str, kinds))
    )
    share = sum(layer["floor_seconds"] or 0 for layer in missing) / total if total else None
    return f"\nwithout a place here (no FLOPs): {counts}, {percent(share)} of the floor"


def _has_a_place(layer: dict) -> bool:
    return all((layer[key] or 0) > 0 for key in ("flops", "bytes", "floor_seconds"))
