"""report.html: one file that needs nothing else, to read on a screen, on a phone or on paper. Its layout is page.html.j2."""

import base64
from collections.abc import Iterator, Mapping
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
    return environment.get_template("page.html.j2").render(
        report=report,
        words=words,
        pictures={
            name: picture if isinstance(picture, str) else base64.b64encode(picture).decode()
            for name, picture in pictures.items()
        },
        drawn={name for name, picture in pictures.items() if isinstance(picture, bytes)},
        telemetry=list(_telemetry(report)),
        layers=layer_table(report),
        predictions=prediction_table(report),
        links=links_sentence(report),
        costs=cost_table(report),
        trace=trace_tables(report),
        settings=settings(report),
        origin={**asdict(report.hardware), "created": report.created, "git revision": report.git_revision},
    )


def _telemetry(report: Report) -> Iterator[tuple[str, Table, str]]:
    """Of each GPU: its name, a table of its readings over the whole run and each stage, and sentences."""
    for place, device in enumerate(report.telemetry.devices):
        columns = {"whole run": device} | {
            STAGES.get(stage, name_of(stage)).removesuffix(" alone"): devices[place]
            for stage, devices in report.telemetry.stages.items()
            if place < len(devices)
        }
        rows = {
            _reading_name(field): {name: _reading(each, field) for name, each in columns.items()}
            for field in device.fields
        }
        rows["energy, J"] = {name: number(each.energy_joules) for name, each in columns.items()}
        rows["throttled, share of samples"] = {name: _throttled(each) for name, each in columns.items()}
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
        sentences += [f"{name_of(field)}: {why}." for field, why in device.missing.items()]
        machine = f"Machine {device.machine}, " if report.hardware.machines > 1 else ""
        table = [{"median": name, **row} for name, row in rows.items()]
        yield f"{machine}GPU {device.index}, {device.name}", table, " ".join(sentences)


def _reading_name(field: str) -> str:
    if field.endswith("_bytes_per_second"):
        return f"{name_of(field.removesuffix('_bytes_per_second'))}, GB/s"
    return f"{name_of(field.removesuffix('_bytes'))}, GiB" if field.endswith("_bytes") else name_of(field)


def _reading(device: Device, field: str) -> str:
    found = device.fields.get(field)
    scale = 1e-9 if field.endswith("_bytes_per_second") else 1 / 2**30 if field.endswith("_bytes") else 1.0
    return number(scale * found.median) if found else NOT_MEASURED


def _throttled(device: Device) -> str:
    if device.throttled_fraction is None:
        return NOT_MEASURED
    reasons = [f"{name_of(reason)} {percent(share)}" for reason, share in device.throttled_fraction.items() if share]
    return ", ".join(reasons) or "never"


def layer_table(report: Report) -> Table:
    """Each layer's work, floors and measured time, forward and backward of one step; measured with bias, ReLU and dropout."""
    step, table = report.stages.step.step_seconds.mean, []
    for layer in report.roofline.layers:
        measured, times = layer.measured_seconds, ratio(layer.measured_seconds, layer.floor_seconds_unfused)
        table.append(
            {
                "layer": text_of(layer.name),
                "kind": text_of(layer.kind),
                "GFLOP": number(layer.flops / 1e9),
                "MB": number(layer.bytes / 1e6),
                "floor, ms": milliseconds(layer.floor_seconds),
                "unfused, ms": milliseconds(layer.floor_seconds_unfused),
                "measured, ms": milliseconds(measured),
                "of unfused": "" if times is None else f"× {number(times)}",
                "of the step": "" if measured is None else percent(measured / step),
            }
        )
    return table


def prediction_table(report: Report) -> Table:
    """Scaling efficiency is % of linear: of so many times one device."""
    return [
        {
            "ranks": number(row.ranks),
            "images/s": number(row.plain.images_per_second),
            "% of linear": percent(row.plain.efficiency),
            "all-reduce, ms": milliseconds(row.plain.all_reduce_seconds),
            "exposed, ms": milliseconds(row.plain.exposed_seconds),
            "16-bit gradients: images/s": number(row.compressed.images_per_second),
            "their % of linear": percent(row.compressed.efficiency),
            "by": row.algorithm if row.ranks > 1 else "",
        }
        for row in report.roofline.scaling
    ]


def links_sentence(report: Report) -> str:
    """Over which links the predictions hold, or why there are none."""
    links = report.roofline.links
    if links is None or not report.roofline.scaling:
        return (
            "Nothing is predicted for other numbers of ranks: the links between them are not known. Name them by flags."
        )
    within = f"{links.gpus_per_node} devices a machine, {with_prefix(links.peer_bytes_per_second, 'B/s')} from each to its peers"
    within += " with in-switch reduction; " if links.in_switch else "; "
    start = "the measured step" if report.roofline.scaling_from == "measured" else "the hardware's floor"
    return (
        f"Predicted from {start}, each rank with the same batch, over these links: {within if links.gpus_per_node > 1 else ''}"
        f"{with_prefix(links.network_bytes_per_second, 'B/s')} from each machine to the others; "
        f"{number(1e6 * links.latency_seconds)} µs a message ({links.source})."
    )


def cost_table(report: Report) -> Table:
    """Of an epoch and of the training; empty where there is no epoch."""
    costs, table = report.costs, []
    if costs is None:
        return []
    whole = f"the training, {costs.epochs:,} epoch{'s' * (costs.epochs != 1)}"
    for name, value, show in (
        ("time", costs.seconds, duration),
        ("energy of the GPUs, kWh", ratio(costs.joules, 3.6e6), number),
        (f"price, {costs.price_basis}", costs.price, number),
    ):
        if costs.price_basis or not name.startswith("price"):
            table.append(
                {"": name, "an epoch": show(value), whole: show(None if value is None else costs.epochs * value)}
            )
    return table


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
        {
            name: text_of(kernel.name),
            "ms a step": milliseconds(kernel.seconds_per_step),
            "of the step": percent(kernel.seconds_per_step / trace.step_seconds),
            "calls a step": number(float(kernel.calls_per_step)),
        }
        for kernel in trace.kernels
    ]
    gaps = [
        {f"idle before this {name}": text_of(before), "ms": milliseconds(seconds)} for seconds, before in trace.gaps
    ]
    return sentence, kernels, gaps


def settings(report: Report) -> tuple[dict[str, object], dict[str, object]]:
    """The configuration: what differs from the defaults, and the rest."""
    changed = {key: value for key, value in report.config.items() if key in report.changed}
    return changed, {key: value for key, value in report.config.items() if key not in changed}
