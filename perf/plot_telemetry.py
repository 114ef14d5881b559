"""What NVML saw over time: power, utilisation, clocks, memory and temperature of each GPU, with the stages shaded."""

from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from perf.plot_style import BLACK, DEVICE_COLOURS, GREY, PALE, new_figure, spread_out
from perf.report_format import find
from perf.report_words import NOT_MEASURED, STAGES, subject

_NO_GPU = "No telemetry: {reason}. So there are no curves of power, utilisation, clocks, memory and temperature."
_STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")


@dataclass(frozen=True)
class Panel:
    title: str
    curves: dict[str, str]
    """Series of the report, and what the legend calls each; no legend for one."""
    scale: float = 1.0
    top: float | None = None


PANELS = (
    Panel("power\nW", {"power_watts": "power"}),
    Panel(
        "utilisation\n%",
        {
            "sm_utilisation_percent": "SM",
            "memory_utilisation_percent": "memory",
            "jpeg_engine_utilisation_percent": "JPEG engine",
        },
        top=105,
    ),
    Panel("clocks\nMHz", {"sm_clock_mhz": "SM", "memory_clock_mhz": "memory"}),
    Panel("memory used\nGiB", {"memory_used_bytes": "used"}, scale=1 / 2**30),
    Panel("temperature\n°C", {"temperature_celsius": "temperature"}),
)


def telemetry(report: dict) -> Figure | str:
    """The picture, or a sentence that says why there is none."""
    devices = find(report, "telemetry.devices") or []
    if not find(report, "telemetry.available") or not devices:
        reason = find(report, "telemetry.reason") or "it was not measured"
        return _NO_GPU.format(reason=reason.rstrip("."))
    devices = [device for device in devices if device["series"] and device["series"]["seconds"]]
    if not devices:
        return _NO_GPU.format(reason="not one sample was taken")
    figure = new_figure(8.6, f"Telemetry of the GPUs\n{subject(report)}")
    all_axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, panel in zip(all_axes, PANELS, strict=True):
        _draw(axes, panel, devices)
    first = min(device["series"]["seconds"][0] for device in devices)
    last = max(device["series"]["seconds"][-1] for device in devices)
    figure.align_ylabels(all_axes)
    all_axes[-1].set(xlim=(first, max(last, first + 1e-3)), xlabel="seconds from the start of the sampling")
    _shade(all_axes, report["telemetry"].get("stage_seconds") or {}, first, last)
    if len(devices) > 1:
        handles = [Line2D([], [], color=_colour(index)) for index in range(len(devices))]
        names = [f"GPU {device['index']}" for device in devices]
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw(axes: Axes, panel: Panel, devices: list[dict]) -> None:
    curves = [key for key in panel.curves if any(_is_measured(device, key) for device in devices)]
    # The first ones wide, so that none hides all of another.
    widths = [1.2 + 1.6 * (1 - (index + 1) / len(devices)) for index in range(len(devices))]
    for index, device in enumerate(devices):
        for key, style in zip(curves, _STYLES, strict=False):
            values = device["series"].get(key) or [None] * len(device["series"]["seconds"])
            heights = [float("nan") if value is None else panel.scale * value for value in values]
            axes.plot(
                device["series"]["seconds"], heights, style, color=_colour(index), linewidth=widths[index], label=key
            )
    axes.set_ylabel(panel.title)
    axes.set_ylim(0, panel.top or 1.1 * axes.dataLim.y1 if curves else 1)
    axes.grid(alpha=0.3)
    if not curves:
        axes.text(0.5, 0.5, NOT_MEASURED, transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_yticks([])
    elif len(panel.curves) > 1:
        handles = [Line2D([], [], color=BLACK, linestyle=style) for _, style in zip(curves, _STYLES, strict=False)]
        axes.legend(
            handles,
            [panel.curves[key] for key in curves],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=3,
            frameon=False,
            fontsize=9,
            borderpad=0,
            borderaxespad=0.2,
        )


def _is_measured(device: dict, key: str) -> bool:
    return any(value is not None for value in device["series"].get(key) or [])


def _shade(all_axes, spans: dict[str, list[float]], first: float, last: float) -> None:
    """Grey behind each stage; its name above the uppermost panel. spans: [first, last second] by stage."""
    ordered = sorted(((stage, span) for stage, span in spans.items() if span), key=lambda item: item[1])
    for _, (start, end) in ordered:
        for axes in all_axes:
            axes.axvspan(start, end, color=PALE, zorder=0)
    middles = [(sum(span) / 2 - first) / max(last - first, 1e-3) for _, span in ordered]
    for (stage, span), middle in zip(ordered, spread_out(middles, 0.13, 0.05, 0.95), strict=True):
        all_axes[0].annotate(
            STAGES.get(stage, stage).removesuffix(" alone"),
            xy=(sum(span) / 2, 1),
            xycoords=all_axes[0].get_xaxis_transform(),
            xytext=(middle, 1.12),
            textcoords="axes fraction",
            ha="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
            parse_math=False,
        )


def _colour(index: int) -> str:
    return DEVICE_COLOURS[index % len(DEVICE_COLOURS)]
