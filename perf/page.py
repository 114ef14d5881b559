"""report.html: one file that needs nothing else, to read on a screen, on a phone or on paper. Its layout is page.html.j2."""

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from msgspec.structs import asdict

from common.process import visible
from perf import words
from perf.report import Device, Report
from perf.words import (
    NOT_MEASURED,
    STAGES,
    Table,
    duration,
    milliseconds,
    name_of,
    number,
    percent,
    printable,
    ratio,
    text_of,
    with_prefix,
)


def page(report: Report, pictures: Mapping[str, bytes | str]) -> str:
    """The whole page. pictures: by name, the PNG of each that the layout shows, or the sentence that says why there is none."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever the report holds, a browser and an editor show it, rather than obey it.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    sources = {
        name: "data:image/png;base64," + base64.b64encode(picture).decode()
        for name, picture in pictures.items()
        if isinstance(picture, bytes)
    }
    return environment.get_template("page.html.j2").render(
        report=report,
        words=words,
        pictures=sources,
        why_none={name: picture for name, picture in pictures.items() if isinstance(picture, str)},
        telemetry=list(_telemetry(report)),
        remark=printable(report.telemetry.reason) if report.telemetry.devices and report.telemetry.reason else None,
        layers=layer_table(report),
        predictions=prediction_table(report),
        costs=cost_table(report),
        trace=trace_tables(report),
        settings=settings(report),
        links=links_sentence(report),
        origin=[[name_of(key), text_of(value)] for key, value in _origin(report).items()],
    )


def _telemetry(report: Report):
    """Of each GPU: its name, a table of its readings over the whole run and each stage, and sentences."""
    for place, device in enumerate(report.telemetry.devices):
        columns = {"whole run": device} | {
            STAGES.get(stage, name_of(stage)).removesuffix(" alone"): devices[place]
            for stage, devices in report.telemetry.stages.items()
            if place < len(devices)
        }
        rows = [
            [_reading_name(field), *(_reading(column, field) for column in columns.values())] for field in device.fields
        ]
        rows.append(["energy, J", *(number(column.energy_joules) for column in columns.values())])
        rows.append(["throttled, share of samples", *(_throttled(column) for column in columns.values())])
        sentences = [
            f"{name}: {number(value)} {unit}."
            for name, value, unit in (
                ("Highest SM clock", device.max_sm_clock_mhz, "MHz"),
                ("Enforced power limit", device.power_limit_watts, "W"),
                ("Default power limit", device.default_power_limit_watts, "W"),
            )
            if value is not None
        ]
        if device.is_mig:
            sentences.append(
                "A part of a GPU (MIG): power, energy, clocks and temperature are the whole GPU's, shared with its other parts; "
                "so there are no images per joule."
            )
        sentences += [f"{name_of(field)}: {printable(why)}." for field, why in device.missing.items()]
        machine = f"Machine {device.machine}, " if report.hardware.machines > 1 else ""
        yield f"{machine}GPU {device.index}, {text_of(device.name)}", (["median", *columns], rows), " ".join(sentences)


def _reading_name(field: str) -> str:
    if field.endswith("_bytes_per_second"):
        return f"{name_of(field.removesuffix('_bytes_per_second'))}, GB/s"
    return f"{name_of(field.removesuffix('_bytes'))}, GiB" if field.endswith("_bytes") else name_of(field)


def _reading(device: Device, field: str) -> str:
    found = device.fields.get(field)
    if found is None:
        return NOT_MEASURED
    scale = 1e-9 if field.endswith("_bytes_per_second") else 1 / 2**30 if field.endswith("_bytes") else 1.0
    return number(scale * found.median)


def _throttled(device: Device) -> str:
    if device.throttled_fraction is None:
        return NOT_MEASURED
    reasons = [f"{name_of(reason)} {percent(share)}" for reason, share in device.throttled_fraction.items() if share]
    return ", ".join(reasons) or "never"


def layer_table(report: Report) -> Table:
    """Each layer's work, floors and measured time, forward and backward of one step; measured with bias, ReLU and dropout."""
    header = ["layer", "kind", "GFLOP", "MB", "floor, ms", "unfused, ms", "measured, ms", "of unfused", "of the step"]
    step = report.stages.step.step_seconds.mean
    rows = []
    for layer in report.roofline.layers:
        times = ratio(layer.measured_seconds, layer.floor_seconds_unfused)
        rows.append(
            [
                text_of(layer.name),
                text_of(layer.kind),
                number(layer.flops / 1e9),
                number(layer.bytes / 1e6),
                milliseconds(layer.floor_seconds),
                milliseconds(layer.floor_seconds_unfused),
                milliseconds(layer.measured_seconds),
                "" if times is None else f"× {number(times)}",
                "" if layer.measured_seconds is None else percent(layer.measured_seconds / step),
            ]
        )
    return header, rows


def prediction_table(report: Report) -> Table:
    """Scaling efficiency is % of linear: of so many times one device."""
    header = [
        "ranks",
        "images/s",
        "% of linear",
        "with 16-bit gradients",
        "% of linear",
        "all-reduce, ms",
        "exposed, ms",
        "by",
    ]
    return header, [
        [
            number(row.ranks),
            number(row.plain.images_per_second),
            percent(row.plain.efficiency),
            number(row.compressed.images_per_second),
            percent(row.compressed.efficiency),
            milliseconds(row.plain.all_reduce_seconds),
            milliseconds(row.plain.exposed_seconds),
            text_of(row.algorithm) if row.ranks > 1 else "",
        ]
        for row in report.roofline.scaling
    ]


def links_sentence(report: Report) -> str:
    """Over which links the predictions hold, or why there are none."""
    links = report.roofline.links
    if links is None or not report.roofline.scaling:
        return (
            "Nothing is predicted for other numbers of ranks: the links between them are not known. Name them by flags."
        )
    parts = []
    if links.gpus_per_node > 1:
        parts.append(
            f"{links.gpus_per_node} devices a machine, {with_prefix(links.peer_bytes_per_second, 'B/s')} from each to its peers"
            + (" with in-switch reduction" if links.in_switch else "")
        )
    parts.append(f"{with_prefix(links.network_bytes_per_second, 'B/s')} from each machine to the others")
    parts.append(f"{number(1e6 * links.latency_seconds)} µs a message")
    start = "the measured step" if report.roofline.scaling_from == "measured" else "the hardware's floor"
    return (
        f"Predicted from {start}, each rank with the same batch, over these links: {'; '.join(parts)} ({links.source})."
    )


def cost_table(report: Report) -> Table | None:
    """Of an epoch and of the training; None where there is no epoch."""
    costs = report.costs
    if costs is None:
        return None
    times = 1, costs.epochs
    rows = [["time", *(duration(each * costs.seconds) for each in times)]]
    energy = [NOT_MEASURED if costs.joules is None else f"{number(each * costs.joules / 3.6e6)} kWh" for each in times]
    rows.append(["energy of the GPUs", *energy])
    if costs.price_basis:
        prices = [number(None if costs.price is None else each * costs.price) for each in times]
        rows.append([f"price, {text_of(costs.price_basis)}", *prices])
    return ["", "an epoch", f"the training, {costs.epochs:,} epoch{'s' * (costs.epochs != 1)}"], rows


def trace_tables(report: Report) -> tuple[str, Table, Table] | None:
    """A sentence, the costliest kernels and the idle gaps; None where nothing was traced."""
    trace = report.trace
    if trace is None:
        return None
    name = "kernel" if report.hardware.device == "cuda" else "operator"
    sentence = (
        f"{trace.steps} steps of training under torch.profiler, which slows them down: {milliseconds(trace.step_seconds)} ms a "
        f"step, of which the device was busy {milliseconds(trace.busy_seconds_per_step)} ms "
        f"({percent(trace.busy_seconds_per_step / trace.step_seconds)})."
    )
    kernels = [
        [
            text_of(kernel.name),
            milliseconds(kernel.seconds_per_step),
            percent(kernel.seconds_per_step / trace.step_seconds),
            number(float(kernel.calls_per_step)),
        ]
        for kernel in trace.kernels
    ]
    gaps = [[text_of(before), milliseconds(seconds)] for seconds, before in trace.gaps]
    return (
        sentence,
        ([name, "ms a step", "of the step", "calls a step"], kernels),
        ([f"idle before this {name}", "ms"], gaps),
    )


def _origin(report: Report) -> dict[str, object]:
    return {**asdict(report.hardware), "created": report.created, "git revision": report.git_revision}


def settings(report: Report) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the configuration: what differs from the defaults, and the rest."""
    rows = {key: [name_of(key), text_of(value)] for key, value in report.config.items()}
    return (
        [row for key, row in rows.items() if key in report.changed],
        [row for key, row in rows.items() if key not in report.changed],
    )
